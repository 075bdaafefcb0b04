"""Batches, held-out loss and the saved model, with the ranks played one after the other in this process."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hift_testing.tiny_models import tiny_model

from hift_ds.recipes import training
from hift_ds.recipes.datasets import IGNORED, Exchange, TextData, TokenRows
from hift_ds.recipes.results import provenance

CPU = torch.device("cpu")


@pytest.fixture
def as_rank(monkeypatch):
    """Makes this process rank `rank` of `world`; `all_reduce` hands its tensor to `reduce`."""

    def become(rank: int, world: int, reduce=lambda tensor: None) -> None:
        fake = SimpleNamespace(
            get_rank=lambda: rank, get_world_size=lambda: world, all_reduce=reduce, barrier=lambda: None
        )
        monkeypatch.setattr(training, "dist", fake)

    return become


def data_of(num_train: int, num_eval: int = 0) -> TextData:
    """Row i is i + 1 times the token i, so that a batch tells which rows are in it; the first token has no loss."""

    def rows(count: int) -> TokenRows:
        tokens = [torch.full((2 + i,), i, dtype=torch.int32) for i in range(count)]
        labels = [torch.cat([torch.tensor([IGNORED] * (1 + i % 2), dtype=torch.int32), row[1 + i % 2 :]]) for i, row in
                  enumerate(tokens)]  # fmt: skip
        return TokenRows(list(zip(tokens, labels, strict=True)))

    return TextData("numbers", "text", rows(num_train), rows(num_eval), 99)


def rows_in(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


# batches


@pytest.mark.parametrize(("rows", "micro_batch", "world"), [(24, 4, 2), (25, 3, 2), (23, 1, 4), (7, 7, 1)])
def test_an_epoch_has_each_row_at_most_once_over_all_ranks_and_leaves_less_than_one_batch(
    as_rank, rows, micro_batch, world
):
    data, per_epoch = data_of(rows), rows // (micro_batch * world)
    epochs: list[list[int]] = [[], [], []]
    for rank in range(world):
        as_rank(rank, world)
        for index, batch in enumerate(islice(training.batches(data, micro_batch, 42, 0, CPU), 3 * per_epoch)):
            assert len(rows_in(batch)) == micro_batch
            epochs[index // per_epoch] += rows_in(batch)
    for seen in epochs:
        assert len(set(seen)) == len(seen) == per_epoch * micro_batch * world
        assert rows - len(seen) < micro_batch * world
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_rows_left_over_in_one_epoch_come_in_another(as_rank):
    as_rank(0, 1)
    epochs = [set() for _ in range(8)]
    for index, batch in enumerate(islice(training.batches(data_of(7), 3, 42, 0, CPU), 16)):
        epochs[index // 2].update(rows_in(batch))
    assert all(len(seen) == 6 for seen in epochs)
    assert set.union(*epochs) == set(range(7))


def test_order_depends_on_the_seed_alone(as_rank):
    def first_epoch(seed: int) -> list[int]:
        as_rank(0, 1)
        return [rows_in(batch)[0] for batch in islice(training.batches(data_of(20), 1, seed, 0, CPU), 20)]

    assert first_epoch(1) == first_epoch(1) != first_epoch(2)


@pytest.mark.parametrize("rank", [0, 1])
def test_stream_from_any_micro_step_is_the_rest_of_the_whole_stream(as_rank, rank):
    as_rank(rank, 2)
    data = data_of(13)  # 3 micro steps per epoch
    whole = [batch["input_ids"] for batch in islice(training.batches(data, 2, 42, 0, CPU), 10)]
    for start in range(9):
        resumed = [batch["input_ids"] for batch in islice(training.batches(data, 2, 42, start, CPU), 10 - start)]
        assert all(torch.equal(a, b) for a, b in zip(resumed, whole[start:], strict=True))


def test_batches_are_padded_rows_on_the_device(as_rank):
    as_rank(0, 1)
    batch = next(training.batches(data_of(3), 3, 42, 0, CPU))
    assert batch["input_ids"].shape == (3, 4)
    for ids, mask, labels in zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True):
        row = int(ids[0])
        assert ids.tolist() == [row] * (2 + row) + [99] * (2 - row)
        assert mask.tolist() == [1] * (2 + row) + [0] * (2 - row)
        assert (labels == IGNORED).sum() == 1 + row % 2 + (2 - row)


def test_fewer_rows_than_one_batch_over_the_ranks_are_refused_with_the_numbers(as_rank):
    as_rank(0, 2)
    message = r"^dataset 'numbers': 7 training rows are fewer than one batch \(4 x 2 ranks\); use a smaller"
    with pytest.raises(ValueError, match=message):
        next(training.batches(data_of(7), 4, 42, 0, CPU))


# held_out_loss


def test_without_held_out_rows_there_is_no_held_out_loss():
    assert training.held_out_loss(CountingEngine(), data_of(3), 1) is None


class CountingEngine:
    """Its loss is the mean, over the tokens that count, of the token's number: known by hand for every batch."""

    device = CPU

    def __init__(self) -> None:
        self.forwards, self.modes = 0, []

    def eval(self) -> None:
        self.modes.append("eval")

    def train(self) -> None:
        self.modes.append("train")

    def __call__(self, input_ids, attention_mask, labels) -> SimpleNamespace:
        assert not torch.is_grad_enabled()
        assert self.modes[-1] == "eval"
        self.forwards += 1
        targets = labels[:, 1:]
        return SimpleNamespace(loss=targets[targets != IGNORED].float().mean())


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_held_out_loss_is_the_mean_per_token_however_the_rows_are_shared(as_rank, world, micro_batch):
    data = data_of(0, 7)
    targets = [data.eval[i]["labels"][1:] for i in range(7)]
    counted = torch.cat([row[row != IGNORED] for row in targets]).float()
    sums, forwards = [], []
    for rank in range(world):
        engine = CountingEngine()
        as_rank(rank, world, reduce=lambda tensor: sums.append(tensor.clone()))
        training.held_out_loss(engine, data, micro_batch)
        forwards.append(engine.forwards)
        assert engine.modes[-1] == "train"
    as_rank(0, world, reduce=lambda tensor: tensor.copy_(torch.stack(sums).sum(0)))
    loss = training.held_out_loss(CountingEngine(), data, micro_batch)
    assert loss == pytest.approx(counted.mean().item(), rel=1e-6)
    assert len(set(forwards)) == 1  # at stage 3 a rank with one forward less would leave the others waiting


# answers and save_model


@pytest.mark.parametrize(("world", "count"), [(1, 3), (2, 5), (4, 2)])
def test_ranks_share_the_questions_and_every_rank_gets_all_answers_in_order(as_rank, monkeypatch, world, count):
    engine = SimpleNamespace(module=tiny_model("llama"))
    questions = [Exchange([{"role": "user", "content": f"q{i}"}], "") for i in range(count)]
    generated = lambda module, tokenizer, asked, *_: [f"a{one.question[1:]}" for one in asked]  # noqa: E731
    monkeypatch.setattr(training, "_generate", generated)
    shares = [[f"a{i}" for i in range(rank, count, world)] for rank in range(world)]

    def of_all_ranks(own: list) -> list:
        assert own == shares[training.dist.get_rank()]
        return shares

    monkeypatch.setattr(training, "of_all_ranks", of_all_ranks)
    for rank in range(world):
        as_rank(rank, world)
        assert training.answers(engine, None, questions, CPU, 8) == [f"a{i}" for i in range(count)]


@pytest.mark.parametrize(
    ("reply", "same"),
    [("One block.", True), ("one  block", True), ("One-block!", True), ("Two blocks.", False), ("One block. 1", False)],
)
def test_answers_are_compared_by_their_words_alone(reply, same):
    assert training.same_answer(reply, "One block.") is same


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_saved_folder_loads_as_the_very_weights(as_rank, tmp_path, family):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    as_rank(0, 1)
    torch.manual_seed(0)
    module, saved = tiny_model(family), []
    tokenizer = SimpleNamespace(save_pretrained=saved.append)
    training.save_model(SimpleNamespace(module=module), tokenizer, tmp_path / "model")
    assert saved == [tmp_path / "model"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for (name, expected), (other, found) in zip(module.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(expected, found)
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        numel = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no mapping
    assert numel == sum(param.numel() for param in module.parameters())  # tied weights once


def test_other_ranks_write_nothing(as_rank, tmp_path):
    as_rank(1, 2)
    training.save_model(SimpleNamespace(module=tiny_model("llama")), None, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_without_git_a_results_file_says_that_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance(torch.device("cpu"))["commit"] == "unknown"
