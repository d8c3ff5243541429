"""Bytes that a program needs, and that there are."""

import os

FITS = 0.8  # share of the memory available that a program may need


def available_bytes(device):
    if stats := device.memory_stats():  # None on the CPU
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except FileNotFoundError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def needed_bytes(memory):
    return (
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def out_of_memory(error):
    return "RESOURCE_EXHAUSTED" in str(error)
