"""Trackers: plugins that report a run to other systems while it trains."""
