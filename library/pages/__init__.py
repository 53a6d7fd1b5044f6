"""Pages for the browser that need no server and no network: a run, a data set, a sheet of images."""
