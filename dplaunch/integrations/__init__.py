"""Thin adapters for programs in which dplaunch is one part. Each is imported by name, and needs what it is for."""
