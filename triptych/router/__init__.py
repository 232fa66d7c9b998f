"""Requests from the moment they are asked for until they are answered: who may come in, what waits, who works on it.

The server's frontend and the simulator run the same code. Knows no HTTP, no socket, no model; the time comes from a
`Clock`.
"""
