// The one stream of this page: changes of runs, and the logs of the runs that are shown.

import { address, session } from "./lib.js";

const FIRST_PAUSE = 500;
const LONGEST_PAUSE = 10_000;
/** Milliseconds; a page in the background gives its connection back. */
const HIDDEN_FOR = 20_000;

class Live {
  #listeners = new Set();
  #at = null;
  #logs = {};
  #abort = null;
  #pause = FIRST_PAUSE;
  #timer = null;
  #hidden = null;
  onState = () => {};

  constructor() {
    document.addEventListener("visibilitychange", () => {
      clearTimeout(this.#hidden);
      if (document.hidden) this.#hidden = setTimeout(() => this.#stop("paused"), HIDDEN_FOR);
      else if (!this.#abort) this.#start();
    });
  }

  /** The state of the list that a response showed, by the gateway's clock. */
  seen(at) {
    if (this.#at === null) { this.#at = at; this.#start(); }
  }

  /** Call `listener(name, data)` for each event; returns a function that ends this. */
  listen(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Follow the logs of these runs from a record each, and no others. */
  follow(logs) {
    const before = Object.keys(this.#logs).sort().join();
    this.#logs = { ...logs };
    if (before !== Object.keys(logs).sort().join() && this.#at !== null) this.#start();
  }

  end() {
    this.#stop("ended");
    this.#at = null;
  }

  #stop(state) {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    this.#abort = null;
    this.onState(state);
  }

  #start() {
    if (this.#at === null || !session.value) return;
    this.#stop("connecting");
    this.#abort = new AbortController();
    this.#read(this.#abort.signal);
  }

  async #read(signal) {
    const query = Object.keys(this.#logs).map((run) => `run=${encodeURIComponent(run)}`).join("&");
    const cursor = [this.#at, ...Object.entries(this.#logs).map(([run, seq]) => `${run}=${seq}`)].join(";");
    try {
      const response = await fetch(address(`console/stream?${query}`), {
        signal, credentials: "same-origin", cache: "no-store", headers: { "last-event-id": cursor },
      });
      if (response.status === 401) {
        this.#stop("ended");
        await session.onEnd();
        this.#start();
        return;
      }
      if (!response.ok) throw new Error(String(response.status));
      this.onState("live");
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        const parts = (rest + value).split("\n\n");
        rest = parts.pop();
        for (const part of parts) this.#dispatch(part);
        this.#pause = FIRST_PAUSE;
      }
    } catch (error) {
      if (error.name === "AbortError") return;
    }
    if (signal.aborted) return;
    this.onState("connecting");
    // All pages of a gateway that restarts must not return at once.
    this.#timer = setTimeout(() => this.#start(), this.#pause * (0.5 + Math.random()));
    this.#pause = Math.min(this.#pause * 2, LONGEST_PAUSE);
  }

  #dispatch(text) {
    const event = {};
    for (const line of text.split("\n")) {
      const at = line.indexOf(": ");
      if (at > 0) event[line.slice(0, at)] = line.slice(at + 2);
    }
    if (!event.event) return;
    const [at, ...logs] = event.id.split(";");
    this.#at = Number(at);
    for (const part of logs) {
      const [run, seq] = part.split("=");
      if (run in this.#logs) this.#logs[run] = Number(seq);
    }
    const data = JSON.parse(event.data);
    for (const listener of [...this.#listeners]) listener(event.event, data);
  }
}

export const live = new Live();
