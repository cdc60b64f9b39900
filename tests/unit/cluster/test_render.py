import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_train.cluster.render import PART, array_script, folders_of, pretrain_script
from llada_train.config.cluster import ClusterConfig
from llada_train.config.errors import UserError
from llada_train.config.load import load, load_config

TEXT = st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@settings(max_examples=30)
@given(value=TEXT, folder=TEXT.map(lambda text: re.sub(r"[/'\"\\]", "_", text)))
def test_no_name_or_value_is_taken_for_shell(value: str, folder: str) -> None:
    """Whatever the words, bash hands them on unchanged; only the part of an array is put in."""
    site = ClusterConfig(node={"gpus": 0, "processes": 1}, variables={"SETTING": value})  # type: ignore[arg-type]
    command = ["printf", "%s\\n", value, f"{folder}/{PART}"]
    script = array_script(site, Path("/tmp") / folder, "name", 3, command)
    begin = script.index("# ---- the site")
    own = (
        'sed() { echo "1/3"; }\n' + script[begin:].replace('echo "$(date', ': "$(date') + 'printf "%s\\n" "$SETTING"\n'
    )
    environment = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "1", "SLURMD_NODENAME": "n1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", "set -u\n" + own], capture_output=True, env=environment)
    assert done.stdout.decode() == f"{value}\n{folder}/1/3\n{value}\n", done.stderr
    whole = pretrain_script(site, Path("/tmp") / folder, Path("/tmp") / folder, 1, True)
    assert subprocess.run(["bash", "-n"], input=whole.encode(), capture_output=True).stderr == b""


def test_a_virtual_environment_has_to_be_there_with_its_archive(tmp_path: Path) -> None:
    for name in ("bin/python", "pyvenv.cfg"):
        (tmp_path / "env" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "env" / name).touch()
    path = tmp_path / "site.yaml"
    path.write_text(f"environment: {{path: {tmp_path}/env, stage: true}}")
    site = load(ClusterConfig, path)
    with pytest.raises(UserError, match=r"env.tar: no such file; make it: tar -C .*/env -cf .*/env.tar \."):
        pretrain_script(site, tmp_path, tmp_path, 1, True)
    (tmp_path / "env.tar").touch()
    script = pretrain_script(site, tmp_path, tmp_path, 1, True)
    assert '"$staged"/bin/python -m llada_train.cli pretrain' in script


def test_submit_and_status_need_no_torch() -> None:
    modules = ("submit", "status", "job", "health", "commands")
    code = f"import sys, {', '.join(f'llada_train.cluster.{name}' for name in modules)}; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_an_image_sees_every_folder_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the working directory, behind a link, by a pattern; but not what it began from and no longer needs."""
    work, image = tmp_path / "work", tmp_path / "image.sif"
    work.mkdir()
    (work / "runs").symlink_to(tmp_path / "large disk/runs")
    image.touch()
    config = load_config(
        Path("configs/pretrain/demo.yaml").absolute(),
        [
            "run_dir=runs/mine",
            "init_from=../base",
            f"data={{tokenizer: ../tok, sequence_length: 128, corpora: [{{path: '{tmp_path}/text/*/part-?'}}]}}",
        ],
    )
    monkeypatch.chdir(work)
    environment = {"kind": "apptainer", "path": image}
    site = ClusterConfig.model_validate(
        {"node": {"gpus": 0, "processes": 1}, "environment": environment, "local_scratch": "/scratch"}
    )

    def seen() -> set[str]:
        script = pretrain_script(site, config.run_dir / "slurm/0001", config.run_dir, 1, True, folders_of(config))
        return set(re.findall(r"--bind (\S+)", script))

    named = {str(tmp_path / name) for name in ("work", "tok", "text")}
    assert {*named, f"'{tmp_path}/large"} <= seen() and not any("*" in path or ".." in path for path in seen())
    assert str(tmp_path / "base") not in seen()
    (tmp_path / "base").mkdir()
    assert str(tmp_path / "base") in seen()


def test_a_path_that_slurm_cannot_take_is_refused() -> None:
    site = ClusterConfig(node={"gpus": 0, "processes": 1})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no path with quotes"):
        pretrain_script(site, Path("/tmp/it's"), Path("/tmp/it's"), 1, True)
