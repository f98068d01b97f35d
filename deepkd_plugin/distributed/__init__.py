"""The processes that train one run together, by torch.distributed.

A launcher such as torchrun starts them. They share each batch: every process passes its own images, and
`collectives.gather` gives each the logits of all, with a graph for its own rows. So each computes the loss of the whole
batch, whatever that compares, and the sum of the processes' gradients (`buckets.Summation`) is the gradient of one
process that had the whole batch.
"""
