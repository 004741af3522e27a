"""scripts/tune tells what a machine lacks, and gives it that, without taking anything away.

The machine is a folder with what its /proc, /sys and /etc would hold.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import tune
from tune_ import host as host_module
from tune_.needs import (
    FILES,
    HUGE_PAGES,
    Host,
    Need,
    Plan,
    fewest_workers,
    files_per_worker,
    larger,
    memory_bytes,
    needs,
)

SCRIPT = Path(__file__).parents[1] / "scripts" / "tune"
GB = 1_000_000_000
# What Debian 12 has on a machine with 8 GB.
SYSCTLS = {
    "fs.epoll.max_user_watches": "1836000",
    "fs.file-max": "9223372036854775807",
    "fs.nr_open": "1048576",
    "net.core.netdev_max_backlog": "1000",
    "net.core.somaxconn": "4096",
    "net.ipv4.ip_local_port_range": "32768\t60999",
    "net.ipv4.tcp_max_orphans": "32768",
    "net.ipv4.tcp_max_syn_backlog": "512",
    "net.ipv4.tcp_mem": "93000\t124000\t186000",
    "net.ipv4.tcp_rmem": "4096\t131072\t6291456",
    "net.ipv4.tcp_syncookies": "1",
    "net.ipv4.tcp_tw_reuse": "2",
    "net.ipv4.tcp_wmem": "4096\t16384\t4194304",
    "net.netfilter.nf_conntrack_buckets": "65536",
    "net.netfilter.nf_conntrack_max": "65536",
    "net.netfilter.nf_conntrack_tcp_timeout_established": "432000",
    "vm.overcommit_memory": "0",
}
TINY = Plan(1_000, 1)
LARGE = Plan(250_000, 16, redis=True)
HUGE = Plan(1_000_000, 64)


def sysctls(**changes: str | None) -> dict[str, tuple[int, ...]]:
    """Return the machine's, some changed or left out, named by their last part."""
    values: dict[str, tuple[int, ...]] = {}
    for key, text in SYSCTLS.items():
        value = changes.get(key.rpartition(".")[2], text)
        if value is not None:
            values[key] = tuple(map(int, value.split()))
    return values


def a_host(**changes: str | None) -> Host:
    return Host(sysctls(**changes), (1_024, 524_288), "always", 8 * GB, 7 * GB)


def find(key: str, plan: Plan, host: Host) -> Need | None:
    return next((need for need in needs(plan, host) if need.key.endswith(key)), None)


def wanted(key: str, plan: Plan, host: Host | None = None) -> str:
    need = find(key, plan, host or a_host())
    assert need is not None
    assert need.is_met == (need.wanted == need.present)
    return need.wanted


# What is needed.


def test_few_connections_need_nothing_of_a_usual_machine() -> None:
    assert all(need.is_met for need in needs(TINY, a_host()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fs.nr_open", "1048576"),
        ("max_user_watches", "1836000"),
        ("netdev_max_backlog", "16384"),  # 1,000,000 × 5 / 60 × 0.1 = 8,333
        ("ip_local_port_range", "10240 65535"),
        ("tcp_tw_reuse", "1"),
        ("tcp_max_orphans", "125000"),
        ("nf_conntrack_max", "2002000"),
        ("nf_conntrack_buckets", "500500"),
        ("timeout_established", "432000"),
    ],
)
def test_a_million_connections(key: str, value: str) -> None:
    assert wanted(key, HUGE) == value


def test_arithmetic_stands_in_the_reason() -> None:
    need = find("fs.file-max", HUGE, a_host(**{"file-max": "1000"}))
    assert need is not None
    assert need.wanted == "3065536"
    assert need.why.endswith("3 × 1,000,000 + 65,536")


def test_what_the_kernel_does_not_have_is_left_out() -> None:
    missing = {key.rpartition(".")[2]: None for key in SYSCTLS if "conntrack" in key}
    assert find("nf_conntrack_max", HUGE, a_host(**missing)) is None
    assert find("nf_conntrack_buckets", HUGE, a_host(**missing)) is None


def test_half_open_connects_are_bounded_only_without_cookies() -> None:
    assert find("tcp_max_syn_backlog", LARGE, a_host()) is None
    assert wanted("tcp_max_syn_backlog", LARGE, a_host(tcp_syncookies="0")) == "4096"


def test_listen_queue_never_exceeds_what_the_gateway_asks_for() -> None:
    assert wanted("somaxconn", HUGE) == "4096"
    assert wanted("somaxconn", HUGE, a_host(somaxconn="128")) == "4096"


def test_range_of_ports_grows_on_both_sides_only() -> None:
    assert wanted("port_range", LARGE, a_host(ip_local_port_range="1024 60999")) == "1024 65535"
    assert wanted("port_range", TINY) == "32768 60999"


def test_ports_are_reused_where_they_would_run_out() -> None:
    assert find("tcp_tw_reuse", TINY, a_host()) is None
    assert wanted("tcp_tw_reuse", LARGE, a_host(tcp_tw_reuse="0")) == "1"


class TestTcpMemory:
    def test_grants_each_connection_the_least_buffers(self) -> None:
        pages = 250_000 * (4_096 + 4_096) // 4_096
        assert wanted("tcp_mem", LARGE) == f"{pages * 3 // 4} {pages} {pages * 3 // 2}"

    def test_each_of_the_three_only_grows(self) -> None:
        host = a_host(tcp_mem="1 600000 700000")
        assert wanted("tcp_mem", LARGE, host) == "375000 600000 750000"

    def test_stays_within_half_of_the_memory(self) -> None:
        host = replace(a_host(), memory_bytes=4 * GB)
        most = 4 * GB // 4_096 // 3
        assert wanted("tcp_mem", HUGE, host) == f"{most * 3 // 4} {most} {most * 3 // 2}"


class TestFiles:
    def test_each_worker_bears_its_share_and_a_quarter_more(self) -> None:
        exact = 1.25 * 250_000 / 16 + 1_000 / 16 + 1_024
        assert exact <= files_per_worker(250_000, 16) < exact + 1_025

    def test_hard_limit_counts(self) -> None:
        need = find(FILES, LARGE, a_host())
        assert need == Need(FILES, "1024 524288", "21504 524288", need.why if need else "", True)

    def test_names_the_workers_for_which_the_limit_is_enough(self) -> None:
        need = find(FILES, Plan(250_000, 2), replace(a_host(), files=(1_024, 20_000)))
        assert need is not None
        assert need.wanted == "158720 158720"
        assert "start 18 workers, for which 20,000 are enough" in need.why

    def test_names_none_where_no_number_is_enough(self) -> None:
        need = find(FILES, LARGE, replace(a_host(), files=(256, 1_024)))
        assert need is not None
        assert "workers, for" not in need.why

    @given(st.integers(1, 10_000_000), st.integers(1_100, 2_000_000))
    def test_so_many_workers_are_enough_and_one_less_is_not(self, count: int, limit: int) -> None:
        workers = fewest_workers(count, limit)
        if workers is None:
            assert limit < 3_072
        else:
            assert files_per_worker(count, workers) <= limit
            assert workers == 1 or files_per_worker(count, workers - 1) > limit


class TestRedis:
    def test_matters_only_where_it_runs(self) -> None:
        host = a_host()
        for key in ("overcommit_memory", HUGE_PAGES):
            assert find(key, replace(LARGE, redis=False), host) is None
            assert find(key, LARGE, host) is not None

    def test_may_fork(self) -> None:
        assert wanted("overcommit_memory", LARGE) == "1"
        assert wanted("overcommit_memory", LARGE, a_host(overcommit_memory="2")) == "2"

    @pytest.mark.parametrize(
        ("mode", "then"), [("always", "madvise"), ("madvise", "madvise"), ("never", "never")]
    )
    def test_has_no_huge_pages_unasked(self, mode: str, then: str) -> None:
        assert wanted(HUGE_PAGES, LARGE, replace(a_host(), huge_pages=mode)) == then

    def test_kernel_may_have_no_huge_pages(self) -> None:
        assert find(HUGE_PAGES, LARGE, replace(a_host(), huge_pages=None)) is None


def test_memory_grows_with_clients_and_workers() -> None:
    assert 6 * GB < memory_bytes(HUGE) < 7 * GB
    assert memory_bytes(Plan(1, 2)) - memory_bytes(Plan(1, 1)) == 6_000_000


numbers = st.integers(0, 1 << 40)
hosts = st.fixed_dictionaries(
    {key: st.tuples(*[numbers for _ in text.split()]) for key, text in SYSCTLS.items()}
)


@given(hosts, st.integers(1, 10_000_000), st.integers(1, 1_000))
def test_nothing_is_ever_lowered_and_once_is_enough(
    values: Mapping[str, tuple[int, ...]], connections: int, workers: int
) -> None:
    host = Host(values, (1_024, 524_288), "always", 8 * GB, 7 * GB)
    plan = Plan(connections, workers, redis=True)
    raised = dict(values)
    for need in needs(plan, host):
        if need.key in values:
            raised[need.key] = tuple(map(int, need.wanted.split()))
            assert larger(need.key, raised[need.key], values[need.key]) == raised[need.key]
    again = replace(host, sysctls=raised, files=(1 << 30, 1 << 30), huge_pages="madvise")
    assert all(need.is_met for need in needs(plan, again))


# docs/tuning.md

DOCUMENT = Path(__file__).parents[1] / "docs" / "tuning.md"
PLANS = (Plan(10_000, 4), Plan(100_000, 8), Plan(1_000_000, 16))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.connections:,}")
def test_document_has_the_values_that_the_script_asks_for(plan: Plan) -> None:
    """Compare the column of a plan; what is enough already stands in brackets."""
    all_needs = {need.key: need for need in needs(plan, replace(a_host(), memory_bytes=32 * GB))}
    table = DOCUMENT.read_text().partition("## What to set")[2].partition("\n\n")[2]
    rows = [
        line.strip("| ").split(" | ") for line in table.partition("\n\nThe values")[0].splitlines()
    ]
    column = rows[2].index(f"{plan.connections:,}")
    compared = 0
    for row in rows:
        key = row[0].split("`")[1] if "`" in row[0] else ""
        if key == "LimitNOFILE":
            assert row[column].strip("()") == str(files_per_worker(plan.connections, plan.workers))
        elif key in SYSCTLS:
            need = all_needs.get(key)
            if need is None:  # it does not matter yet
                assert row[column] == f"({SYSCTLS[key]})"
            else:
                assert row[column] == (f"({need.wanted})" if need.is_met else need.wanted)
            compared += 1
    assert compared == 7
    assert rows[-2][column] == f"{memory_bytes(plan) / GB:.1f} GB"


def test_document_links_to_headings_that_exist() -> None:
    text = DOCUMENT.read_text()
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


# A machine in a folder.


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Lay out a machine."""
    for key, value in SYSCTLS.items():
        put(host_module.sysctl_path(tmp_path, key), f"{value}\n")
    put(tmp_path / "proc/meminfo", "MemTotal:  8000000 kB\nMemAvailable:  7000000 kB\n")
    put(tmp_path / "proc/self/limits", limits("1024", "20000"))
    put(tmp_path / "sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never\n")
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limits(soft: str, hard: str) -> str:
    return (
        "Limit                     Soft Limit           Hard Limit           Units     \n"
        f"Max open files            {soft:20} {hard:20} files     \n"
    )


def run(machine: Path, *arguments: str, connections: int = 250_000) -> int:
    return tune.main([f"--connections={connections}", f"--root={machine}", *arguments])


def everything_in(machine: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in machine.rglob("*") if path.is_file()}


def now(machine: Path, key: str) -> str:
    return host_module.sysctl_path(machine, key).read_text().strip()


def test_reads_a_machine(machine: Path) -> None:
    host = host_module.read(machine)
    assert host.sysctls == sysctls()
    assert host.files == (1_024, 20_000)
    assert host.huge_pages == "always"
    assert (host.memory_bytes, host.available_bytes) == (8_192_000_000, 7_168_000_000)


def test_limit_of_files_may_be_none(machine: Path) -> None:
    put(machine / "proc/self/limits", limits("1024", "unlimited"))
    assert host_module.read(machine).files[1] > 1_000_000_000


def test_something_that_is_no_linux_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 2
    assert "this is for Linux only" in capsys.readouterr().err


def test_shows_and_changes_nothing(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything_in(machine)
    assert run(machine, "--workers=2") == 1
    assert everything_in(machine) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "For 250,000 connections and 2 workers:"
    [files] = [line for line in lines if "nofile " in line]
    assert files.split() == ["LOW", "nofile", "1024", "20000", "→", "158720", "158720"]
    assert lines[-2].endswith("scripts/tune --connections 250000 --workers 2 --apply")
    assert "LimitNOFILE=158720" in lines[-1]


def test_all_is_met(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(machine, connections=1_000) == 0
    assert capsys.readouterr().out.endswith("All is met.\n")


class TestApply:
    def test_sets_what_is_too_low_and_nothing_else(self, machine: Path) -> None:
        before = everything_in(machine)
        assert run(machine, "--apply", "--workers=2") == 0
        changed = {
            str(path.relative_to(machine))
            for path, text in everything_in(machine).items()
            if before.get(path) != text
        }
        assert changed == {
            "proc/sys/net/core/netdev_max_backlog",
            "proc/sys/net/ipv4/ip_local_port_range",
            "proc/sys/net/ipv4/tcp_mem",
            "proc/sys/net/ipv4/tcp_tw_reuse",
            "proc/sys/net/netfilter/nf_conntrack_buckets",
            "proc/sys/net/netfilter/nf_conntrack_max",
            "etc/modules-load.d/90-ws2api.conf",
            "etc/security/limits.d/90-ws2api.conf",
            "etc/sysctl.d/90-ws2api.conf",
        }
        assert now(machine, "net.ipv4.tcp_mem") == "375000 500000 750000"

    def test_says_what_it_wrote(self, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = everything_in(machine)
        run(machine, "--apply", "--redis=yes")
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote ")]
        written = {Path(line.removeprefix("wrote ").split(":")[0]) for line in said}
        after = everything_in(machine)
        assert written == {path for path, text in after.items() if before.get(path) != text}
        backlog = host_module.sysctl_path(machine, "net.core.netdev_max_backlog")
        assert f"wrote {backlog}: 4096, was 1000" in said

    def test_lasts_beyond_the_next_boot(self, machine: Path) -> None:
        run(machine, "--apply", "--workers=2", "--redis=yes")
        sysctl_file = (machine / host_module.SYSCTL_FILE).read_text().splitlines()
        assert sysctl_file[0].startswith("# Written by scripts/tune")
        for line in sysctl_file[1:]:
            key, value = line.split(" = ")
            assert now(machine, key) == value != SYSCTLS[key]
        limits_file = (machine / host_module.LIMITS_FILE).read_text().splitlines()
        assert [line.split() for line in limits_file[1:]] == [
            [who, which, "nofile", "158720"] for who in ("*", "root") for which in ("soft", "hard")
        ]
        assert "\nnf_conntrack\n" in (machine / host_module.MODULES_FILE).read_text()
        temporary = (machine / host_module.TEMPORARY_FILE).read_text()
        assert temporary.endswith("w /sys/kernel/mm/transparent_hugepage/enabled - - - - madvise\n")

    def test_again_writes_nothing(self, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run(machine, "--apply")
        put(machine / "proc/self/limits", limits("524288", "524288"))
        before = everything_in(machine)
        assert run(machine, "--apply") == 0
        assert everything_in(machine) == before
        assert "Nothing was written" in capsys.readouterr().out

    def test_fewer_connections_take_nothing_back(self, machine: Path) -> None:
        run(machine, "--apply", connections=1_000_000)
        before = everything_in(machine)
        run(machine, "--apply", connections=100_000)
        assert everything_in(machine) == before

    def test_more_connections_keep_what_was_set_before(self, machine: Path) -> None:
        run(machine, "--apply", "--redis=yes", connections=100_000)
        run(machine, "--apply", connections=1_000_000)
        lines = (machine / host_module.SYSCTL_FILE).read_text().splitlines()
        assert "vm.overcommit_memory = 1" in lines
        assert "net.core.netdev_max_backlog = 16384" in lines

    def test_file_of_ours_that_is_higher_than_the_kernel_stays(self, machine: Path) -> None:
        put(machine / host_module.SYSCTL_FILE, "net.core.netdev_max_backlog = 99999\n")
        run(machine, "--apply")
        text = (machine / host_module.SYSCTL_FILE).read_text()
        assert "net.core.netdev_max_backlog = 99999\n" in text

    def test_warns_of_files_that_are_read_later(
        self, machine: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for folder, name in (("usr/lib", "99-a"), ("etc", "99-sysctl"), ("etc", "10-early")):
            text = "-net.ipv4.tcp_mem = 1 2 3\nnet/core/somaxconn=1\n"
            put(machine / folder / "sysctl.d" / f"{name}.conf", text)
        run(machine, "--apply")
        warnings = [line for line in capsys.readouterr().out.splitlines() if "Mind that" in line]
        assert [line.split()[2] for line in warnings] == [
            str(machine / "etc/sysctl.d/99-sysctl.conf"),
            str(machine / "usr/lib/sysctl.d/99-a.conf"),
        ]
        assert all("sets net.ipv4.tcp_mem as well" in line for line in warnings)

    def test_what_cannot_be_written_is_an_error_and_the_rest_is_done(
        self, machine: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (machine / "etc").write_text("a file where a folder should be")
        assert run(machine, "--apply") == 2
        output = capsys.readouterr()
        assert f"could not write {machine / host_module.SYSCTL_FILE}: Not a directory" in output.err
        assert "In a container" in output.err
        assert now(machine, "net.ipv4.tcp_mem") == "375000 500000 750000"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may")
    def test_needs_root(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert tune.main(["--connections=1000", "--apply"]) == 2
        assert "needs root" in capsys.readouterr().err

    def test_asks_who_it_is_before_it_writes(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(tune, "apply", lambda *_: pytest.fail("it would have written"))
        assert tune.main(["--connections=1000000", "--apply"]) == 2
        assert "needs root" in capsys.readouterr().err


class TestJson:
    def shown(self, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
        result = json.loads(capsys.readouterr().out)
        assert isinstance(result, dict)
        return result

    def test_tells_each_need(self, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(machine, "--json", "--workers=16") == 1
        shown = self.shown(capsys)
        assert (shown["connections"], shown["workers"], shown["is_met"]) == (250_000, 16, False)
        memory = {need["key"]: need for need in shown["needs"]}["net.ipv4.tcp_mem"]
        assert memory["present"] == "93000 124000 186000"
        assert memory["wanted"] == "375000 500000 750000"
        assert memory["is_met"] is False
        assert "written" not in shown

    def test_tells_what_was_written(
        self, machine: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        put(machine / "proc/self/limits", limits("524288", "524288"))
        assert run(machine, "--json", "--apply") == 0
        shown = self.shown(capsys)
        assert shown["is_met"] is True
        assert shown["failed"] == []
        assert any(line.startswith(f"{machine}/etc/sysctl.d/") for line in shown["written"])


@pytest.mark.parametrize("arguments", [[], ["--connections=0"], ["--connections=many"]])
def test_wrong_arguments_are_an_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tune.main(arguments)
    assert caught.value.code == 2


def test_runs_without_a_virtualenv() -> None:
    """Look at the machine that this runs on; what it has is its own affair."""
    done = subprocess.run(
        [SCRIPT, "--connections", "250,000", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (0, 1), done.stderr
    assert json.loads(done.stdout)["connections"] == 250_000
