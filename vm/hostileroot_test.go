package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"nbd/vm/fault"
)

// A builder that is root in its guest, beside the agent and outside the sandbox,
// spoils its own build and nothing else: another one runs all the while, and the
// host's files are what they were.
func TestHostileRoot(t *testing.T) {
	blobs := memBlobs{}
	input := dir(map[string]*tree{"greeting": file(strings.Repeat("hello\n", 10_000))})
	plan, err := fault.Parse("none,root-builder*")
	if err != nil {
		t.Fatal(err)
	}
	r := newTestRunner(t, blobs, func(c *Config) { c.Faults = plan })
	neighbour := shellSpec("neighbour", "echo begun; i=0; while [ $i -lt 20 ]; do sleep 1; sha256sum $in/greeting; i=$((i+1)); done; cp $in/greeting $out", blobs, input, t)
	archive := bytes.Clone(blobs[neighbour.Inputs[0].NarHash])
	specs := map[string]*Spec{}
	spec := func(id, script string) {
		s := shellSpec(id, script, blobs, input, t)
		s.MaxLog, s.Timeout = 1<<20, 4*time.Minute
		specs[id] = s
	}
	// Disks are found by their serials.
	const disks = `for d in /sys/block/vd*; do eval "$(cat $d/serial)=/dev/${d##*/}"; done; `
	spec("disks", disks+`dd if=/dev/zero of=$in0 bs=4096 count=1; echo "wrote: $?"
		for p in /dev/vport*; do (cat /dev/urandom > $p) & done; sleep 1; dd if=/dev/urandom of=$out bs=4096 count=100 conv=fsync; sleep 5`)
	spec("agent", `kill -9 1; exe=$(head -n1 /proc/1/maps); a=0x${exe%%-*}; dd if=/dev/urandom of=/proc/1/mem bs=4096 seek=$((a/4096)) count=1000; sleep 1000`)
	spec("freeze", `mkdir /sys/fs/cgroup/frozen; echo 1 > /sys/fs/cgroup/frozen/cgroup.procs; echo 1 > /sys/fs/cgroup/frozen/cgroup.freeze; sleep 1000`)
	spec("forks", `f() { f | f & }; f; fallocate -l 1200M /dev/a; fallocate -l 1200M /b; sleep 1000`)
	spec("space", `fallocate -l 2000000000 /scratch/big; sleep 1000`)
	specs["space"].ScratchMiB = 64
	specs["forks"].Timeout = 20 * time.Second

	warmUp(t, r, neighbour) // there shall be one guest, and none of a template
	begun, ended := make(chan struct{}), make(chan error, 1)
	outs := new(memOutputs)
	go func() {
		var log bytes.Buffer
		_, err := r.Run(t.Context(), neighbour, writerFunc(func(p []byte) (int, error) {
			if log.Len() == 0 {
				close(begun)
			}
			return log.Write(p)
		}), outs)
		ended <- err
	}()
	select {
	case <-begun:
	case err := <-ended:
		t.Fatal(err)
	}
	pids := guestPIDs(t)
	if len(pids) != 1 {
		t.Fatalf("QEMUs %v", pids)
	}
	checkQEMU(t, r, pids[0])
	hasten(t, 10) // the frozen agent
	for _, tt := range []struct {
		id   string
		want string // in the error
	}{
		{"disks", "outputs were refused"},
		{"agent", "panicked"},
		{"freeze", "no sign of life"},
		{"forks", ""},
		{"space", "no space left"},
	} {
		t.Run(tt.id, func(t *testing.T) {
			ctx, stop := context.WithTimeoutCause(t.Context(), 5*time.Minute, errors.New("it is stuck"))
			defer stop()
			var log bytes.Buffer
			_, err := r.Run(ctx, specs[tt.id], &log, new(memOutputs))
			t.Logf("%v", err)
			if err == nil || ctx.Err() != nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(log.String(), "wrote: 0") {
				t.Errorf("got %v, want %q; log %.2000q", err, tt.want, log.String())
			}
		})
	}
	if err := <-ended; err != nil || !bytes.Equal(outs.nars["out"].Bytes(), input.kids["greeting"].archive(t)) {
		t.Errorf("the neighbour: %v", err)
	}
	if !bytes.Equal(blobs[neighbour.Inputs[0].NarHash], archive) {
		t.Error("an input was changed")
	}
	if n := guestProcesses(t); n != 0 {
		t.Errorf("%d guests are left", n)
	}
}

// checkQEMU checks what the kernel tells of a real QEMU: whose it is, what it may
// do, and that it has nothing open but what it was given and what is its own.
func checkQEMU(t *testing.T, r *Runner, pid int) {
	t.Helper()
	checkConfined(t, pid, r.confined)
	status := statusOf(t, pid)
	want := map[string]string{"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
		"CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2"}
	if r.ids.first >= 0 {
		id := status["Uid"][:strings.IndexByte(status["Uid"], ' ')]
		want["Uid"] = strings.Join([]string{id, id, id, id}, " ")
		want["Gid"], want["Groups"] = want["Uid"], ""
		if id == fmt.Sprint(os.Getuid()) || id == "0" {
			t.Errorf("QEMU runs as %s", id)
		}
	}
	for name, value := range want {
		if status[name] != value {
			t.Errorf("%s is %q, want %q", name, status[name], value)
		}
	}
	if r.cgroups != nil {
		group, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil || !strings.Contains(string(group), "/"+cgroupName(os.Getpid(), 0)[:len(cgroupName(os.Getpid(), 0))-1]) {
			t.Errorf("cgroup %s, %v", group, err)
		}
	}
	known := regexp.MustCompile(`^(` + regexp.QuoteMeta(ownMemory) + `|/dev/null|socket:.*|pipe:.*|anon_inode:.*|` +
		regexp.QuoteMeta(r.cfg.RuntimeDir) + `/.* \(deleted\))$`)
	for _, to := range openFiles(t, pid) {
		if !known.MatchString(to) {
			t.Errorf("QEMU has %s open", to)
		}
	}
}

// ownMemory is the name of the memory of a guest that runs a build.
const ownMemory = "/memfd:nbd-guest (deleted)"

// openFiles returns what a process has open. What guests share may not be open
// for writing.
func openFiles(t *testing.T, pid int) (open []string) {
	t.Helper()
	links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		to, err := os.Readlink(l)
		if err != nil {
			continue // closed meanwhile
		}
		if strings.Contains(to, "/"+bootPrefix) {
			info, err := os.ReadFile(strings.Replace(l, "/fd/", "/fdinfo/", 1))
			if err == nil && !regexp.MustCompile(`flags:\s+[0-7]*0\n`).Match(info) {
				t.Errorf("QEMU can write to %s: %s", to, info)
			}
		}
		open = append(open, to)
	}
	return open
}
