"""The streaming image de-duplicator: consumes image events, publishes duplicate verdicts."""
