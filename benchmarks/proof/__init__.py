"""Proof without a GPU: what compilers made of every kernel, measured in its machine code (`make proof`).

    machine_code   instructions by their bits: accesses by width, branches, the shortest way through
    disassembly    a cubin: registers, stack, shared memory, and its code; the disassembler's text
    occupancy      how many threads a multiprocessor holds, by NVIDIA's rules
    traffic        bytes that a step must move for each element
    covering       a short list of cases with every pair; cases: the list of steps, committed as covering.txt
    paths, cuda    every kernel of step.fatbin, its rows and docs/gpu-kernels.md
    triton, products, triton_page    every Triton kernel that is compiled ahead, its rows and docs/triton-kernels.md
    table          benchmarks/results/kernels.json, keyed by compilers, and how rows differ from it
"""
