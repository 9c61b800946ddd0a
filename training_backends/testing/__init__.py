"""Tools for testing backends: scripted servers, faults, conformance checks. No pytest required."""
