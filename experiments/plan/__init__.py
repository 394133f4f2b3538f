"""The planner: what a run takes on devices that need not be there.

architectures   networks by name, without their weights
chips           memory, bandwidth and arithmetic of accelerators
programs        the run's programs, from abstract arrays, compiled for a topology
hlo             which collectives a compiled program has, and where
estimate        roofline times and totals
tables          what is printed
weak_scaling    bytes over the interconnect from 4 chips to 256
"""
