"""What runs in a worker process: sockets, the step loop, and how an instance is built."""
