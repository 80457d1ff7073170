"""Shared parts of every op: argument structs, dispatch, checks, noise, levels, memory layout."""
