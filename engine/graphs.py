"""Compilation, and CUDA graphs: many GPU kernels replayed with a single launch."""

import contextlib
import copy
import threading

import torch
import torch._functorch.config
import torch.nn as nn

from engine import parallel
from engine.attention import has_differential_kernel, kernels

COMPILE_MODES = ("auto", "on", "whole", "off")  # on: layer by layer; auto: so with CUDA; whole: the model at once


def wants_compile(mode, device):
    """Return True if the flag --compile, one of COMPILE_MODES, asks for torch.compile on this device."""
    return mode in ("on", "whole") or (mode == "auto" and device.type == "cuda")


def compile_model(model, mode, device):
    """Compile a model as --compile asks -> what training calls: in the mode `whole` a compiled model, else `model`.

    A model that several processes share is compiled layer by layer in that mode, too.
    """
    # The backward pass may recompute cheap things that feed a matrix product, like norms, instead of keeping them: a
    # fifth less memory, about 1 % slower.
    torch._functorch.config.ban_recompute_materialized_backward = False
    if wants_compile(mode, device):
        with compiling_kernels(model, device):
            if mode == "whole" and parallel.WORLD_SIZE == 1:
                configure_compiler()
                return torch.compile(model)
            compile_modules((*model.layers, model.norm))
    return model


def compile_for_tuning(model):
    """Compile the layers of a model, in place, for batches of any shape.

    Each operation rounds to bf16 as it does uncompiled: DPO's policy and reference are different programs, whose
    results must not differ where their weights do not. The last norm stays uncompiled: compiled, it adds in another
    order.
    """

    def require_gradient(layer, inputs):
        inputs[0].requires_grad_(torch.is_grad_enabled())

    # Embeddings are frozen. If they have a gradient all the same, the first layer has the others' program.
    model.layers[0].register_forward_pre_hook(require_gradient)
    with compiling_kernels(model, model.rope_cos.device):
        torch._dynamo.config.specialize_float = True  # else LoRA's scale is computed anew, on the CPU
        compile_modules(model.layers, dynamic=True, options={"emulate_precision_casts": True})


def compile_modules(modules, **options):
    """Compile the forward() of each module, in place, with torch.compile's options. This is regional compilation.

    Layers of one kind share a program, so that they compile in half the time of a whole model. Copy a model before:
    the copy of a compiled one would run the original's layers.
    """
    configure_compiler()
    for module in modules:
        module.forward = torch.compile(module.forward, **options)


def configure_compiler():
    """Let the compiler make enough programs, and start its processes."""
    torch._dynamo.config.recompile_limit = 32  # with n_kv_layers there are three kinds of layers, and modes of each
    with contextlib.suppress(ImportError):  # it is not part of PyTorch's interface
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()  # the processes that compile Triton kernels take seconds to start: meanwhile, go on


@contextlib.contextmanager
def compiling_kernels(model, device):
    """Compile training's Triton kernels in a thread, which takes seconds, while the body imports PyTorch's compiler."""
    if kernels is None or device.type != "cuda":
        yield
        return
    thread = threading.Thread(target=run_kernels, args=(model, device))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def run_kernels(model, device):
    """Run each Triton kernel of the model's training once, on small tensors. So compiled, it serves for any size.

    A model that is tuned on texts shorter than its context may need others.
    """
    with contextlib.suppress(Exception), torch.cuda.device(device):  # training tries again, and says what is wrong
        config, attn, options = model.config, model.layers[0].attn, dict(dtype=torch.bfloat16, device=device)
        kernels.cross_entropy_(torch.zeros(1, config.vocab_size, **options), torch.zeros(1, device=device).long())
        heads, D, width = attn.q_per_head * config.n_head, config.head_dim, attn.value_width
        q = torch.zeros(1, 64, heads, D, **options)
        k = torch.zeros(1, 64, config.n_kv_head, D, **options)
        v = torch.zeros(1, 64, config.n_kv_head // width, width * D, **options)
        whole = q[:, :1].expand(-1, config.block_size, -1, -1)  # whether there is a kernel depends on the context
        if hasattr(attn, "lam") and has_differential_kernel(whole, k, v, impl=config.attn_impl):
            kernels.compile_differential_attention(q, k, v)


def uncompiled():
    """Return a context in which compiled functions run uncompiled, where a program of its own would not pay."""
    return torch.compiler.set_stance("force_eager")


def bf16_copy(model, device):
    """Copy a model to `device` with its frozen matrices in bf16, without a float32 copy on the way."""
    frozen = [p for p in model.parameters() if p.ndim == 2 and not p.requires_grad]
    cast = {id(p): nn.Parameter(p.bfloat16().to(device), requires_grad=False) for p in frozen}
    return copy.deepcopy(model, cast).to(device)


def cuda_graph(function, pool=None):
    """Record what function() does on the GPU, and return a function that does it again with a single launch.

    function() is called three times. It has to find its inputs and leave its results at the same places each time.
    """
    stream, graph, random = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.get_rng_state()
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a graph may not use weights that autocast has cast before
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles and plans; neither may happen while recording
                function()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may use the GPU
            function()
    finally:
        torch.set_autocast_cache_enabled(caching)
    torch.cuda.set_rng_state(random)  # as if nothing had been drawn yet
    return graph.replay


class GraphedForwardBackward:
    """Run train.forward_backward() as CUDA graphs, one for every shape of a micro-batch.

    A step on a few thousand tokens has more than two thousand kernels, which take longer to launch one by one than to
    run. `loss_fn` may not look at a value (.item()), nor depend on anything but its arguments and the parameters.
    """

    def __init__(self, loss_fn, parameters):
        self.loss_fn, self.parameters = loss_fn, [p for p in parameters if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]  # graphs write to a fixed place
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()

    def __call__(self, *tensors):
        """Add a micro-batch's gradients to .grad, and return the values of loss_fn. The next call overwrites them."""
        if self.parameters[0].grad is None:  # the first micro-batch of a step
            torch._foreach_zero_(self.gradients)
            for parameter, gradient in zip(self.parameters, self.gradients):
                parameter.grad = gradient
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.record(tensors)
        inputs, values, replay = self.graphs[shapes]
        for graph_input, tensor in zip(inputs, tensors):
            graph_input.copy_(tensor)
        replay()
        return values

    def record(self, tensors):
        """Record the graph for tensors of these shapes -> its inputs, its results, and the function that runs it."""
        inputs, values = [tensor.clone() for tensor in tensors], {}
        before = [gradient.clone() for gradient in self.gradients]

        def forward_backward():
            share = self.loss_fn(*inputs)
            torch._foreach_add_(self.gradients, torch.autograd.grad(share["loss"], self.parameters))
            values.update({name: value.detach() for name, value in share.items()})

        replay = cuda_graph(forward_backward, self.pool)
        torch._foreach_copy_(self.gradients, before)  # recording has added to them
        return inputs, values, replay
