"""The backends that come with dplaunch, each imported only when it is asked for by name."""
