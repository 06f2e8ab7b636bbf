"""The ways to run the server: services, containers. Long forms: `python -m tests.deploy.image`, `.machine`."""
