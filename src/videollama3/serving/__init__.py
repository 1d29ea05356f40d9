"""Adapters to serving engines that exist; nothing here is imported by `import videollama3`."""
