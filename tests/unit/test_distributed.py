"""Before the engine: reading the config, a process group for a lone process, errors that reach every rank."""

import base64
import json
import os

import pytest
from deepspeed import comm as dist
from hift_testing.messages import error_of

from hift_ds import distributed as launching
from hift_ds.config.files import load_ds_config
from hift_ds.distributed import agree

CONFIG = {"train_batch_size": 8, "hift": {"enabled": True, "order": "random"}, "zero_optimization": {"stage": 2}}


def write(tmp_path, text, name="ds.json"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_mapping_is_taken_as_it_is():
    config = dict(CONFIG)
    assert load_ds_config(config) is config


@pytest.mark.parametrize("as_type", [str, lambda path: path], ids=["str", "Path"])
def test_a_file_is_read_as_json(tmp_path, as_type):
    assert load_ds_config(as_type(write(tmp_path, json.dumps(CONFIG)))) == CONFIG


def test_a_file_with_comments_is_read_as_deepspeed_reads_it(tmp_path):
    path = write(tmp_path, '{\n  // two ranks\n  "train_batch_size": 8, # of 4\n  "hift": {"enabled": true,}\n}')
    assert load_ds_config(path) == {"train_batch_size": 8, "hift": {"enabled": True}}


def test_base64_is_read_as_deepspeed_reads_it():
    text = base64.urlsafe_b64encode(json.dumps(CONFIG).encode()).decode()
    assert load_ds_config(text) == CONFIG
    # Longer than a file name may be: asking the file system for it is an error of its own.
    long = {**CONFIG, "tensorboard": {"job_name": "x" * 5000}}
    assert load_ds_config(base64.urlsafe_b64encode(json.dumps(long).encode()).decode()) == long


@pytest.mark.parametrize("source", ["no/such/file.json", "", "ds_config", "\0", None, 3, "aGVsbG8="])
def test_what_is_no_config_is_left_for_deepspeed_to_refuse(source):
    assert load_ds_config(source) is source


def test_a_folder_is_left_for_deepspeed_to_refuse(tmp_path):
    assert load_ds_config(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"train_batch_size": 8', '{"train_batch_size": }', '{"a": 1}}', b"\xff\xfe{}", ""],
    ids=["cut", "no value", "one brace more", "not UTF-8", "empty"],
)  # fmt: skip
def test_a_file_that_is_not_json_is_named(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=r"^DeepSpeed config ") as caught:
        load_ds_config(path)
    assert str(path) in str(caught.value)
    assert "not JSON (" in str(caught.value) or "must be a JSON object" in str(caught.value)


@pytest.mark.parametrize(("text", "kind"), [("[1, 2]", "list"), ("3", "int"), ('"text"', "str"), ("null", "NoneType")])
def test_a_file_that_holds_no_object_is_named(tmp_path, text, kind):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"must be a JSON object, is a {kind}$") as caught:
        load_ds_config(path)
    assert str(path) in str(caught.value)


def test_a_key_that_stands_twice_is_named(tmp_path):
    path = write(tmp_path, '{"hift": {"enabled": true, "order": "random", "order": "top2down"}}')
    with pytest.raises(ValueError, match="key 'order' stands twice"):
        load_ds_config(path)


def test_agree_alone_is_a_plain_call():
    assert agree(lambda: 7) == 7
    with pytest.raises(KeyError, match="here"):
        agree(lambda: {}["here"])


@pytest.fixture
def environment(monkeypatch):
    """None of a launcher's variables, and a record of how deepspeed.init_distributed is called."""
    for name in (*launching.RANK_VARIABLES, *launching.MPI_VARIABLES, "HIFT_DS_SHM"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(launching.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(launching.deepspeed, "init_distributed", lambda **kwargs: calls.append(kwargs))
    monkeypatch.setitem(launching.deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    yield calls
    for name in launching.RANK_VARIABLES:
        os.environ.pop(name, None)


def test_a_lone_process_gets_a_world_of_its_own(environment):
    launching.init_distributed()
    assert {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    assert 0 < int(os.environ["MASTER_PORT"]) < 65536
    assert len(environment) == 1


def test_a_launcher_s_variables_are_left_alone(environment, monkeypatch):
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node7", "MASTER_PORT": "29511"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    launching.init_distributed(port=29600, required=True)
    assert {name: os.environ[name] for name in given} == given
    assert environment[0]["dist_init_required"] is True


def test_under_mpi_the_ranks_are_left_to_deepspeed(environment, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    launching.init_distributed(port=29600)
    assert "RANK" not in os.environ
    assert [call["distributed_port"] for call in environment] == [29600]


def test_under_mpi_master_port_says_where_ranks_meet_so_that_two_jobs_fit_on_one_machine(environment, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29511")
    launching.init_distributed(port=29600)
    assert [call["distributed_port"] for call in environment] == [29511]


def test_the_shared_memory_operator_is_built_only_when_asked_for(environment, monkeypatch):
    ops = launching.deepspeed.ops.__compatible_ops__
    monkeypatch.setenv("HIFT_DS_SHM", "1")
    launching.init_distributed()
    assert ops["deepspeed_shm_comm"] is True
    monkeypatch.delenv("HIFT_DS_SHM")
    launching.init_distributed()
    assert ops["deepspeed_shm_comm"] is False


@pytest.mark.parametrize("initialized", [False, True])
def test_each_rank_takes_its_own_device_before_the_first_collective(environment, monkeypatch, initialized):
    taken = []
    monkeypatch.setattr(type(launching.get_accelerator()), "set_device", lambda self, index: taken.append(index))
    monkeypatch.setattr(launching.dist, "is_initialized", lambda: initialized)
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    launching.init_distributed()
    assert taken == [1]


def test_tasks_of_srun_without_ranks_are_refused_instead_of_training_alone_each(environment, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(RuntimeError, match=r"srun has started 4 tasks.*set RANK, LOCAL_RANK"):
        launching.init_distributed()
    assert environment == [] and "RANK" not in os.environ
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    launching.init_distributed()
    assert len(environment) == 1


def test_a_rank_without_a_device_of_its_own_is_refused_before_it_joins(environment, monkeypatch):
    monkeypatch.setattr(type(launching.get_accelerator()), "device_name", lambda self, index=None: "cuda")
    monkeypatch.setattr(type(launching.get_accelerator()), "device_count", lambda self: 1)
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="LOCAL_RANK=1: this process sees 1 devices"):
        launching.init_distributed()
    assert environment == []


def test_a_second_call_does_nothing(environment, monkeypatch):
    monkeypatch.setattr(launching.dist, "is_initialized", lambda: True)
    launching.init_distributed()
    assert environment == []


def agree_on(failing: tuple[int, ...]) -> int | str:
    """This rank's number through `agree`, or what it raised where a rank is in `failing`. Collective."""

    def work() -> int:
        if dist.get_rank() in failing:
            raise ValueError(f"rank {dist.get_rank()} has a bad file")
        return dist.get_rank()

    found = []
    return error_of(lambda: found.append(agree(work))) or found[0]


@pytest.mark.multi_rank
def test_agree_gives_each_rank_its_own_result(two_ranks):
    assert two_ranks.run(agree_on, ()) == [0, 1]


@pytest.mark.multi_rank
@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
def test_an_error_on_one_rank_is_raised_on_all(two_ranks, failing):
    reports = two_ranks.run(agree_on, failing)
    for rank, report in enumerate(reports):
        if rank in failing:
            assert report == f"ValueError: rank {rank} has a bad file"
        else:
            assert report == f"RuntimeError: rank {failing[0]} failed: ValueError: rank {failing[0]} has a bad file"
