"""Lightning plugins: layer synchronisation, loggers, checkpoint writing, profiler."""
