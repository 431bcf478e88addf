"""How a process of its own gets eight devices on a CPU."""

__all__ = ["FLAGS"]

FLAGS = (
    "--xla_force_host_platform_device_count=8 "
    # What is compiled there runs once, on small arrays: optimising it would take most of the time.
    "--xla_backend_optimization_level=0 "
    # Else collectives that do not depend on one another may wait for each other for ever, on few cores.
    "--xla_cpu_enable_concurrency_optimized_scheduler=false"
)
