"""The model without autograd inside: hand-written backward passes on fused kernels.

weights    the tensors of a layer, and their float8 copies
layer      one layer, forward and backward beside each other
attention  which attention kernel runs, and its backward
products   matrix products; weight gradients summed in float32; float8
block      a layer of prelude or coda as one step of autograd
recurrence the loop over iterations, and what its backward pass will need
unwinding  the loop back, layer by layer
core       both in autograd, which takes a layer's gradients as soon as they are whole
"""
