// The harness brings all of it.
