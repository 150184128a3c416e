"""Brokers that a source may acknowledge to; each of these modules needs an extra of its own."""
