"""Sending requests and taking the time: one loop, and drivers that answer."""
