"""Pages for the browser that need no server and no network: that of a run."""
