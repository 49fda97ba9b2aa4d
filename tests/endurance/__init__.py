"""What must not grow while a process runs on: memory, open files, threads, objects, time per call."""
