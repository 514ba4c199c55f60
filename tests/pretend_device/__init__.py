"""A pretend CUDA device on a CPU build of torch, which refuses what CUDA refuses.

Tensors stay in the CPU's memory. Whether one is "on cuda:0" is a tag on its storage, which views share and which
`Tensor.device` shows. Two modes of torch watch every call: `Front` moves tensors and refuses what waits for the
device, `Back` refuses operations on tensors of different devices, checks that streams are ordered, and records the
operations of a captured graph. A graph is poisoned with NaN after its capture and replayed into the same memory.

    places.py   tags: on which device a storage is
    streams.py  streams and events, with vector clocks
    graphs.py   captured graphs
    modes.py    Front and Back
    tracing.py  tensors without values (fake tensors) that are on the device
    kernels.py  the scans of neurons, run by numba or by Triton's interpreter in the same memory
    device.py   replaces the functions of torch.cuda
    plugin.py   pytest -p pretend_device.plugin

Not modelled: the choice of algorithms in cuBLAS and cuDNN, reuse of memory by the allocator, the streams of autograd's
own threads, and NCCL.
"""
