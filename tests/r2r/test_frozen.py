"""The frozen model: the same answers, from threads too, in tiles, traced; on a GPU from CUDA graphs."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from r2r import R2R, InputError, fast
from r2r.data.images import image_files, read_rgb
from r2r.tiling import restore_photo, tile_side
from tests.conftest import TINY, fill_randomly

TASKS = ("denoise", "derain", "dehaze")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quick_model(**changes: object) -> fast.R2R:
    torch.manual_seed(0)
    model = fast.R2R(tasks=TASKS, **{**TINY, **changes})
    fill_randomly(model)
    return model.eval()


@pytest.fixture
def model() -> fast.R2R:
    return quick_model()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("changes", [{}, {"mixtures": True}, {"matching": "soft"}, {"gate_kernel": 3}])
def test_float32_has_the_models_answers(changes: dict[str, object]) -> None:
    model = quick_model(**changes)
    state = torch.random.get_rng_state()
    frozen = model.freeze(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert frozen.tasks == model.tasks
    assert frozen.amalgamator is None
    assert not any(p.requires_grad for p in frozen.parameters())
    for shape in ((2, 3, 40, 24), (1, 3, 1, 1), (0, 3, 16, 16)):
        lq = torch.rand(shape)
        torch.testing.assert_close(frozen(lq), model(lq))
        for task in (None, "derain"):
            got, wanted = frozen.restore(lq, task), model.restore(lq, task)
            torch.testing.assert_close(got.image, wanted.image)
            torch.testing.assert_close(got.scores, wanted.scores)
            assert torch.equal(got.task, wanted.task)


@pytest.mark.parametrize("dtype", DTYPES)
def test_images_keep_their_dtype_where_it_is_wider(model: fast.R2R, dtype: torch.dtype) -> None:
    frozen = model.freeze(dtype)
    assert frozen.intro.weight.dtype == dtype
    assert frozen.intro.weight.is_contiguous(memory_format=torch.channels_last)
    lq = torch.rand(2, 3, 40, 24)
    assert frozen(lq).dtype == torch.float32
    assert frozen(lq.to(dtype)).dtype == dtype
    for given in DTYPES:
        restored = frozen.restore(lq.to(given), strength=0.5).image
        assert restored.dtype == torch.promote_types(given, dtype)
    norms = frozen.bank.keys.flatten(2).norm(dim=2)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    assert model.bank.keys.flatten(2).norm(dim=2).min() > 1.1  # the model itself stays as it was
    with torch.autocast("cpu", torch.bfloat16):
        assert (frozen(lq) - frozen(lq)).abs().max() == 0
        assert (frozen(lq) - model(lq)).abs().max() < 0.1


def test_bfloat16_costs_less_than_a_hundredth_of_a_decibel(shared: Path) -> None:
    """Real photos with noise, restored by a small model that was trained for 120 steps to remove it."""
    with torch.enable_grad():
        model = denoiser(shared / "data" / "train" / "clean")
    frozen = model.freeze(torch.bfloat16)
    results: dict[str, list[float]] = {"input": [], "model": [], "frozen": []}
    for path in image_files(shared / "data" / "test" / "denoise" / "clean")[:8]:
        hq = torch.from_numpy(read_rgb(path)[:320, :320].transpose(2, 0, 1).copy())[None]
        lq = noisy(hq, 3)
        for name, image in (("input", lq), ("model", model(lq)), ("frozen", frozen(lq))):
            results[name].append(-10 * (image.clamp(0, 1) - hq).square().mean().log10().item())
    means = {name: float(np.mean(found)) for name, found in results.items()}
    assert means["model"] > means["input"] + 2
    assert abs(means["frozen"] - means["model"]) < 0.01


def noisy(hq: Tensor, seed: int) -> Tensor:
    noise = torch.randn(hq.shape, generator=torch.Generator().manual_seed(seed))
    return (hq + 25 / 255 * noise).clamp(0, 1)


def denoiser(photos: Path) -> fast.R2R:
    crops = [
        torch.from_numpy(read_rgb(path)[100:164, 100:164].transpose(2, 0, 1).copy())
        for path in image_files(photos)[:96]
    ]
    clean = torch.stack(crops)
    torch.manual_seed(0)
    model = fast.R2R(tasks=("noise", "none"), **{**TINY, "width": 8}).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(120):
        hq = clean[torch.randperm(len(clean))[:8]]
        lq = torch.cat((noisy(hq[:6], step), hq[6:]))
        labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
        output = model(lq, labels, reference=(lq, hq, labels))
        optimiser.zero_grad()
        (output.restored - hq).abs().mean().backward()
        optimiser.step()
    return model.eval()


def test_the_parts_restore_large_photos_in_tiles(model: fast.R2R) -> None:
    pixels = torch.rand(250, 330, 3).numpy()
    budget = 21 * 4 * 4 * 240**2
    assert tile_side(model.freeze(torch.float32), budget) == tile_side(model, budget)
    wanted = restore_photo(model, pixels, memory=budget)
    eager = R2R(**model.config)
    eager.load_state_dict(model.state_dict())
    for other, tolerance in (
        (eager.eval(), 1e-4),
        (model.freeze(torch.float32), 1e-4),
        (model.freeze(torch.bfloat16), 0.1),
    ):
        got = restore_photo(other, pixels, memory=budget)
        assert got.tiles == wanted.tiles > 1
        assert got.tasks == wanted.tasks
        assert abs(got.pixels - wanted.pixels).max() < tolerance


def test_threads_share_it(model: fast.R2R) -> None:
    frozen = model.freeze()
    images = [torch.rand(1, 3, 16 + 5 * index, 40 - 3 * index) for index in range(6)]
    wanted = [frozen(lq) for lq in images]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for turn in range(5):
                one = (index + turn) % len(images)
                if not torch.equal(frozen(images[one]), wanted[one]):
                    wrong.append(one)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell a process its size")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_thousand_calls_of_changing_shapes_leak_nothing(model: fast.R2R, frozen: bool) -> None:
    restorer = model.freeze() if frozen else model
    shapes = torch.randint(1, 65, (1000, 2), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = []
    for index, shape in enumerate(shapes):
        restorer.restore(torch.rand(1, 3, *shape))
        if index in (249, 999):
            gc.collect()
            sizes.append((resident(), sum(type(x) is Tensor for x in gc.get_objects())))
    assert sizes[1][0] - sizes[0][0] < 8 << 20
    assert sizes[1][1] <= sizes[0][1]


def test_compiles_and_exports_with_dynamic_sizes(model: fast.R2R) -> None:
    size = torch.export.Dim.DYNAMIC
    for dtype in (torch.float32, torch.bfloat16):
        torch.compiler.reset()
        frozen = model.freeze(dtype)
        example = (torch.rand(2, 3, 40, 56),)
        program = torch.export.export(frozen, example, dynamic_shapes=({0: size, 2: size, 3: size},)).module()
        compiled = torch.compile(frozen, fullgraph=True, dynamic=True, backend="aot_eager")
        for shape in ((2, 3, 40, 56), (1, 3, 33, 70), (3, 3, 64, 48), (1, 3, 5, 16)):
            lq = torch.rand(shape)
            rounding = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(program(lq), frozen(lq), rtol=rounding, atol=rounding)
            torch.testing.assert_close(compiled(lq), frozen(lq), rtol=rounding, atol=rounding)


def test_what_it_is_not_for_is_named(model: fast.R2R, tmp_path: Path) -> None:
    frozen = model.freeze()
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        model.freeze(torch.float64)
    with pytest.raises(InputError, match="the bank is empty"):
        fast.R2R(tasks=TASKS, **TINY).freeze()
    with pytest.raises(ValueError, match="only restores"):
        frozen.train()
    with pytest.raises(ValueError, match="not saved"):
        frozen.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="freeze the model there"):
        torch.ops.r2r.naf_block_folded(torch.rand(1, 4, 5, 6), [torch.rand(4)] * 12, 1e-6)


def test_on_a_cpu_it_is_float32_unless_told(model: fast.R2R) -> None:
    assert {one.dtype for one in model.freeze().parameters()} == {torch.float32}
    assert model.freeze(torch.bfloat16).intro.weight.dtype == torch.bfloat16


def test_a_copy_is_a_model_of_its_own(model: fast.R2R) -> None:
    frozen = model.freeze()
    lq = torch.rand(1, 3, 20, 30)
    twin = copy.deepcopy(frozen)
    assert torch.equal(twin(lq), frozen(lq))
    with torch.no_grad():
        model.intro.weight.zero_()
    assert torch.equal(twin(lq), frozen(lq))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(model: fast.R2R) -> fast.R2R:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return model.cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_give_the_bits_of_the_plain_call(on_gpu: fast.R2R, dtype: torch.dtype) -> None:
    frozen = on_gpu.freeze(dtype)
    images = [torch.rand(2, 3, 40, 24, device="cuda") for _ in range(4)]
    plain = [R2R._restored(frozen, lq, None) for lq in images]
    for turn in range(3):  # runs, captures, replays
        for lq, wanted in zip(images, plain, strict=True):
            for got, same in zip(frozen.restore(lq), wanted, strict=True):
                assert torch.equal(got, same)
        assert len(frozen.replays) == 1, turn
    told = torch.tensor([2, 0], device="cuda")
    for _ in range(3):
        assert torch.equal(frozen.restore(images[0], told).image, R2R._restored(frozen, images[0], told).image)
    assert len(frozen.replays) == 2
    assert (frozen(images[0]) - on_gpu(images[0])).abs().max() < 0.1


@pytest.mark.gpu
def test_a_new_shape_just_runs_and_old_ones_are_forgotten(on_gpu: fast.R2R) -> None:
    frozen = on_gpu.freeze()
    images = [torch.rand(1, 3, 16 * (1 + index), 32, device="cuda") for index in range(10)]
    for lq in images:
        frozen(lq)
    assert len(frozen.replays) == 0
    for lq in images[-8:] + images[-8:]:
        frozen(lq)
    assert len(frozen.replays) == 8
    for lq in images:
        assert torch.equal(frozen(lq), R2R._restored(frozen, lq, None).image)
        assert len(frozen.replays) <= 8
    frozen.replays.clear()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        for lq in images:
            frozen(lq)
    frozen.replays.clear()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_a_changed_bank_is_captured_anew(on_gpu: fast.R2R) -> None:
    frozen = on_gpu.freeze()
    lq = torch.rand(1, 3, 32, 32, device="cuda")
    for _ in range(3):
        frozen(lq)
    frozen.bank.remove_task("denoise")
    for _ in range(3):
        assert torch.equal(frozen(lq), R2R._restored(frozen, lq, None).image)


@pytest.mark.gpu
def test_threads_on_streams_of_their_own_replay_in_turns(on_gpu: fast.R2R) -> None:
    frozen = on_gpu.freeze()
    images = [torch.rand(1, 3, 32, 32 + 16 * (index % 2), device="cuda") for index in range(6)]
    wanted = [R2R._restored(frozen, lq, None).image for lq in images]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work() -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(60):
                one = turn % len(images)
                if not torch.equal(frozen(images[one]), wanted[one]):
                    wrong.append(one)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.gpu
def test_no_graph_where_it_would_be_wrong(on_gpu: fast.R2R) -> None:
    frozen = on_gpu.freeze(torch.float32)
    lq = torch.rand(1, 3, 32, 32, device="cuda")
    with torch.autocast("cuda", torch.float16):
        for _ in range(3):
            frozen(lq)
    assert len(frozen.replays) == 0


@pytest.mark.gpu
def test_other_weights_are_captured_anew(on_gpu: fast.R2R) -> None:
    """Whatever exchanges a tensor: a graph would go on reading the old one, or what lies there now."""
    frozen = on_gpu.freeze()
    lq = torch.rand(1, 3, 32, 32, device="cuda")

    def agrees() -> None:
        wanted = R2R._restored(frozen, lq, None).image
        for _ in range(3):
            assert torch.equal(frozen(lq), wanted)
        assert len(frozen.replays) == 1

    agrees()
    frozen.load_state_dict({name: x + 0.01 for name, x in frozen.state_dict().items()}, assign=True, strict=False)
    agrees()
    frozen.ending.weight = torch.nn.Parameter(2 * frozen.ending.weight.detach(), requires_grad=False)
    agrees()
    bias = frozen.ending.bias
    assert bias is not None
    bias.data = bias.data + 0.1
    agrees()
    bias.add_(0.1)  # in its place: the graph reads it
    agrees()


@pytest.mark.gpu
def test_bad_values_are_refused_on_a_gpu_too(on_gpu: fast.R2R) -> None:
    frozen, lq = on_gpu.freeze(), torch.rand(1, 3, 32, 32, device="cuda")
    for _ in range(3):
        frozen.restore(lq)
    with pytest.raises(ValueError, match="values in \\[0, 1\\]"):
        frozen.restore(lq * torch.nan)
    assert torch.equal(frozen.restore(lq).image, R2R._restored(frozen, lq, None).image)
