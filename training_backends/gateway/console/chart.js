// Charts of metrics over steps, for one run or several.

import uPlot from "./vendor/uPlot.js";
import { h, measure, number } from "./lib.js";

const COLORS = ["--chart-1", "--chart-2", "--chart-3", "--chart-4", "--chart-5", "--chart-6", "--chart-7", "--chart-8"];
const SMOOTHING = 0.85;
/** Points of a series; more than a screen shows, and few enough for a run of days. */
const MOST_POINTS = 10_000;

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Values by step of one metric. */
export class Series {
  constructor(label, { color: index = 0, dashed = false } = {}) {
    this.label = label;
    this.index = index;
    this.dashed = dashed;
    this.points = new Map();
  }

  set(steps, values) {
    steps.forEach((step, at) => this.points.set(step, values[at]));
    if (this.points.size <= MOST_POINTS) return;
    const sorted = [...this.points].sort((a, b) => a[0] - b[0]);
    this.points = new Map(sorted.filter((_, at) => at % 2 === 0 || at === sorted.length - 1));
  }

  /** The value of the last step, or undefined. */
  get last() {
    let found;
    for (const step of this.points.keys()) if (!(found > step)) found = step;
    return this.points.get(found);
  }
}

/** An exponential mean that starts unbiased, as in TensorBoard. */
function smoothed(values) {
  let mean = 0;
  let weight = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    mean = mean * SMOOTHING + value * (1 - SMOOTHING);
    weight = weight * SMOOTHING + (1 - SMOOTHING);
    return mean / weight;
  });
}

export class Chart {
  #plot = null;
  #planned = 0;
  #isLog = false;
  #isSmooth = false;
  #dark = matchMedia("(prefers-color-scheme: dark)");
  #rebuild = () => this.#build();

  /** Place `tools` and `element`. */
  constructor(title, series) {
    this.title = title;
    this.series = series;
    this.area = h("div", { class: "plot", role: "img" });
    const toggle = (label, change) => h("label", { class: "check" },
      h("input", { type: "checkbox", onchange: (event) => { change(event.currentTarget.checked); this.#build(); } }), label);
    this.tools = h("div", { class: "tools" },
      toggle("Smooth", (on) => { this.#isSmooth = on; }),
      toggle("Log scale", (on) => { this.#isLog = on; }));
    this.nothing = h("p", { class: "muted quiet-space" }, "No measurements yet.");
    this.element = h("div", { class: "chart" }, this.area, this.nothing);
    this.#dark.addEventListener("change", this.#rebuild);
    this.observer = new ResizeObserver(() => this.#resize());
    this.observer.observe(this.area);
  }

  /** Draw what was added since, once per frame. */
  update() {
    this.#planned ||= requestAnimationFrame(() => {
      this.#planned = 0;
      if (!this.#plot || this.#plot.series.length !== this.series.length + 1) this.#build();
      else this.#plot.setData(this.#data());
      this.#describe();
    });
  }

  destroy() {
    cancelAnimationFrame(this.#planned);
    this.observer.disconnect();
    this.#dark.removeEventListener("change", this.#rebuild);
    this.#plot?.destroy();
    this.#plot = null;
  }

  #data() {
    const steps = [...new Set(this.series.flatMap((each) => [...each.points.keys()]))].sort((a, b) => a - b);
    return [steps, ...this.series.map((each) => {
      const values = steps.map((step) => each.points.get(step) ?? null);
      return this.#isSmooth && !each.dashed ? smoothed(values) : values;
    })];
  }

  #describe() {
    const parts = this.series.filter((each) => each.points.size).map((each) => {
      const points = [...each.points].sort((a, b) => a[0] - b[0]);
      const [[firstStep, first], [lastStep, last]] = [points[0], points.at(-1)];
      return `${each.label}: ${measure(first)} at step ${firstStep}, ${measure(last)} at step ${lastStep}`;
    });
    this.area.setAttribute("aria-label", `${this.title}. ${parts.join(". ")}`);
    this.nothing.hidden = parts.length > 0;
    this.area.hidden = this.tools.hidden = parts.length === 0;
  }

  #size() {
    const width = this.area.clientWidth || 600;
    return { width, height: Math.round(Math.min(560, Math.max(220, width * 0.36))) };
  }

  #resize() {
    if (this.#plot && Math.abs(this.#plot.width - this.area.clientWidth) > 1) this.#plot.setSize(this.#size());
    else if (!this.#plot && this.area.clientWidth) this.update();
  }

  #build() {
    this.#plot?.destroy();
    this.#plot = null;
    this.#describe();
    if (this.area.hidden || !this.area.isConnected) return;
    const scale = parseFloat(getComputedStyle(document.documentElement).fontSize) / 16;
    const font = `${Math.round(12 * scale)}px ${getComputedStyle(document.body).fontFamily}`;
    const axis = {
      stroke: color("--text-2"), font, grid: { stroke: color("--line"), width: 1 },
      ticks: { show: false }, gap: 8 * scale,
    };
    this.#plot = new uPlot({
      ...this.#size(),
      padding: [12, 12, 0, 0],
      cursor: { points: { size: 7 }, drag: { x: true, y: false } },
      legend: { live: true },
      scales: { x: { time: false }, y: { distr: this.#isLog ? 3 : 1 } },
      axes: [
        { ...axis, size: 32 * scale, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? number(tick) : "")) },
        { ...axis, size: 58 * scale, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : String(Number(tick.toPrecision(3))))) },
      ],
      series: [
        { label: "Step", value: (_, value) => (value === null ? "–" : number(value)) },
        ...this.series.map((each) => ({
          label: each.label,
          stroke: color(COLORS[each.index % COLORS.length]),
          width: 2,
          dash: each.dashed ? [6, 4] : undefined,
          spanGaps: true,
          points: { show: each.points.size < 3 || (each.dashed && each.points.size < 60), size: 6 },
          value: (_, value) => measure(value),
        })),
      ],
    }, this.#data(), this.area);
  }
}
