"""What clients ask for: files, arrival processes, distributions, traces; in the end a list of requests."""
