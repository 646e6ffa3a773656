"""Thin adapters to what people have already. Each module needs a package of its own and names it when it is missing."""
