"""Publishes image events: from folders, link tables and JSON lines."""
