package server

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"nbd/vm"
)

// writeTree writes files below dir.
func writeTree(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// A fakeMachine is a Machine of plain files.
type fakeMachine struct {
	*Machine
	t    *testing.T
	load vm.Load
}

func newFakeMachine(t *testing.T, availableMiB int) *fakeMachine {
	m := &fakeMachine{t: t}
	m.Machine = NewMachine(t.TempDir(), 0, func() vm.Load { return m.load }, slog.New(slog.DiscardHandler))
	m.proc, m.cgroups = t.TempDir(), t.TempDir()
	m.available(availableMiB)
	return m
}

func (m *fakeMachine) available(mib int) {
	m.t.Helper()
	writeTree(m.t, m.proc, map[string]string{"meminfo": fmt.Sprintf("MemTotal: 8192000 kB\nMemFree: 5 kB\nMemAvailable: %d kB\n", mib*1024)})
}

func (m *fakeMachine) memory() (total, available int) {
	m.t.Helper()
	total, err := m.totalMiB()
	if err != nil {
		m.t.Fatal(err)
	}
	available, err = m.availableMiB()
	if err != nil {
		m.t.Fatal(err)
	}
	return total, available
}

// TestMachine reads this one.
func TestMachine(t *testing.T) {
	m := NewMachine(t.TempDir(), 1, func() vm.Load { return vm.Load{MemoryMiB: 5, DiskMiB: 6} }, slog.New(slog.DiscardHandler))
	have, err := m.room()
	if err != nil || have.memoryMiB < 1 || have.diskMiB < 1 || have.guestsMemoryMiB != 5 || have.guestsDiskMiB != 6 {
		t.Errorf("%+v, %v", have, err)
	}
	if total, err := m.totalMiB(); err != nil || total < have.memoryMiB/2 {
		t.Errorf("total %d MiB, %v", total, err)
	}
}

// TestMachineCgroups has files as kernels of both versions of cgroups show them.
func TestMachineCgroups(t *testing.T) {
	m := newFakeMachine(t, 4000)
	check := func(name string, wantTotal, wantAvailable int) {
		t.Helper()
		if total, available := m.memory(); total != wantTotal || available != wantAvailable {
			t.Errorf("%s: %d MiB in all, %d available; want %d, %d", name, total, available, wantTotal, wantAvailable)
		}
	}
	check("no cgroups", 8000, 4000)
	writeTree(t, m.proc, map[string]string{"self/cgroup": "0::/system.slice/nbd.service/server\n"})
	check("no files", 8000, 4000)
	writeTree(t, m.cgroups, map[string]string{
		"memory.stat":                            "anon 1\n",
		"system.slice/memory.max":                "max\n",
		"system.slice/memory.current":            "1\n",
		"system.slice/nbd.service/memory.max":    fmt.Sprintln(3000 << 20),
		"system.slice/nbd.service/memory.stat":   fmt.Sprintf("anon 17\nactive_file 5\ninactive_file %d\n", 700<<20),
		"system.slice/nbd.service/server/x":      "",
		"system.slice/nbd.service/memory.events": "",
	})
	check("a limit without a count", 8000, 4000)
	writeTree(t, m.cgroups, map[string]string{"system.slice/nbd.service/memory.current": fmt.Sprintln(1000 << 20)})
	check("a limit above", 3000, 2700)
	writeTree(t, m.proc, map[string]string{"self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/x\n0::/\n"})
	writeTree(t, m.cgroups, map[string]string{
		"memory/memory.limit_in_bytes":          "9223372036854771712\n",
		"memory/memory.usage_in_bytes":          "1\n",
		"memory/docker/x/memory.limit_in_bytes": fmt.Sprintln(5000 << 20),
		"memory/docker/x/memory.usage_in_bytes": fmt.Sprintln(4000 << 20),
	})
	check("version 1", 5000, 1000)
	writeTree(t, m.proc, map[string]string{"meminfo": "MemTotal: x kB\n"})
	if _, err := m.totalMiB(); err == nil {
		t.Error("no error for a file that says nothing")
	}
	if _, err := m.availableMiB(); err == nil {
		t.Error("no error for a file that lacks a line")
	}
}

func TestMachinePressed(t *testing.T) {
	m := newFakeMachine(t, 1000)
	for text, want := range map[string]bool{
		"": false,
		"some avg10=99.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=9.99 avg60=50.00 avg300=0.00 total=1\n": false,
		"some avg10=99.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=10.00 avg60=0.00 avg300=0.00 total=1\n": true,
		"full avg10=x\n": false,
	} {
		writeTree(t, m.proc, map[string]string{"pressure/memory": text})
		if got := m.pressed(); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

// TestQueueLooksAtMachine has other programs take memory, and give it back.
func TestQueueLooksAtMachine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newFakeMachine(t, 100)
		qt := newQueueTest(t, Room{Guests: 100, MemoryMiB: 10000, CPUs: 100})
		qt.q.machine = m.Machine
		need := Room{MemoryMiB: 1000, CPUs: 1}
		for _, name := range []string{"1", "2", "3"} {
			qt.ask(t.Context(), name, 1, need)
		}
		qt.want("1") // one may always run
		if want := []string{"waiting for free memory of the machine: next in the queue"}; !slices.Equal(qt.places["2"], want) {
			t.Errorf("told %q", qt.places["2"])
		}
		// There is enough for two now, but the first may still take most of that.
		m.load = vm.Load{MemoryMiB: 200}
		m.available(800 + keptMemoryMiB + 1000 - 1)
		qt.look()
		qt.want("1")
		m.available(800 + keptMemoryMiB + 1000)
		qt.look()
		qt.want("1", "2")
		// A machine whose programs wait for memory gets no more of them.
		m.available(8000)
		writeTree(t, m.proc, map[string]string{"pressure/memory": "full avg10=50.00\n"})
		qt.look()
		qt.want("1", "2")
		writeTree(t, m.proc, map[string]string{"pressure/memory": "full avg10=0.00\n"})
		// What cannot be found out keeps nobody waiting.
		if err := os.Remove(filepath.Join(m.proc, "meminfo")); err != nil {
			t.Fatal(err)
		}
		qt.look()
		qt.want("1", "2", "3")
		for _, name := range []string{"1", "2", "3"} {
			qt.end(name)
		}
		qt.wg.Wait()
		if qt.q.again != nil || qt.q.running != 0 {
			t.Errorf("left: %+v", qt.q)
		}
	})
}

// look lets the time to the next look at the machine pass.
func (qt *queueTest) look() {
	qt.t.Helper()
	time.Sleep(betweenLooks)
	synctest.Wait()
}

// TestQueueLooksAtDisk has builds that are expected to write more than is free.
func TestQueueLooksAtDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newFakeMachine(t, 100000)
		have, err := m.room()
		if err != nil {
			t.Fatal(err)
		}
		m.minFreeMiB = have.diskMiB - 10000 // 10000 MiB are left, more or less
		q := newQueue(Room{Guests: 100, MemoryMiB: 10000, CPUs: 100}, m.Machine)
		var got []int
		var releases []func()
		places := make(chan queuePlace, 10)
		ask := func(n, writes int) {
			_, release, err := q.acquire(t.Context(), func() ([]want, <-chan struct{}) {
				return []want{{account: 1, need: Room{Guests: 1, MemoryMiB: 1, CPUs: 1}, writesMiB: writes}}, nil
			}, func(p queuePlace) { places <- p })
			if err != nil {
				t.Error(err)
			}
			got, releases = append(got, n), append(releases, release)
		}
		ask(1, 50000) // one may always run
		m.load.DiskMiB = 49000
		ask(2, 5000)
		m.load.DiskMiB = 50000
		done := make(chan struct{})
		go func() { ask(3, 9000); close(done) }()
		if p := <-places; p.lacks != "disk of the machine" {
			t.Errorf("it waits for %q", p.lacks)
		}
		first, second := releases[0], releases[1]
		first()
		m.load.DiskMiB = 0
		second()
		<-done
		if diff := cmp.Diff([]int{1, 2, 3}, got); diff != "" {
			t.Error(diff)
		}
		releases[2]()
		if q.writes != 0 {
			t.Errorf("%d MiB are still to be written", q.writes)
		}
	})
}

// TestQueueFewerCPUs has a build that wishes for more CPUs than are free.
func TestQueueFewerCPUs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(Room{Guests: 100, MemoryMiB: 100, CPUs: 10}, nil)
		var releases []func()
		for _, c := range []struct{ wish, least, want int }{{4, 2, 4}, {8, 2, 6}} {
			got, release, err := q.acquire(t.Context(), func() ([]want, <-chan struct{}) {
				return []want{{account: 1, need: Room{Guests: 1, MemoryMiB: 1, CPUs: c.wish}, leastCPUs: c.least}}, nil
			}, nil)
			if err != nil || got.need.CPUs != c.want {
				t.Errorf("of %d to %d: %+v, %v", c.least, c.wish, got, err)
			}
			releases = append(releases, release)
		}
		for _, release := range releases {
			release()
		}
		if s := q.status(); s.Free != s.Total {
			t.Errorf("left: %+v", s)
		}
		// More than there are at all is a wish, too; as the least it is refused.
		got, release, err := q.acquire(t.Context(), func() ([]want, <-chan struct{}) {
			return []want{{account: 1, need: Room{Guests: 1, CPUs: 20}, leastCPUs: 2}}, nil
		}, nil)
		if err != nil || got.need.CPUs != 10 {
			t.Errorf("%+v, %v", got, err)
		}
		release()
		if _, _, err := q.acquire(t.Context(), one(1, Room{CPUs: 11}), nil); err == nil {
			t.Error("no error")
		}
	})
}
