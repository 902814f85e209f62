"""Everything around the worker: local servers, containers, dashboards, documentation."""
