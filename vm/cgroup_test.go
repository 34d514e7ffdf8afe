package vm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A process that eats more than its group's memory is killed, and the group
// goes with what is in it.
func TestCgroup(t *testing.T) {
	f, weak, err := newCgroups()
	if err != nil {
		t.Skipf("nothing can be tried where cgroups are not permitted: %v", err)
	}
	defer func() {
		if err := f.close(); err != nil {
			t.Error(err)
		}
	}()
	t.Logf("weaknesses: %q", weak)
	t.Run("limit", func(t *testing.T) {
		name := cgroupName(os.Getpid(), 1<<40)
		g, err := f.create(name, 32)
		if err != nil {
			t.Fatal(err)
		}
		dir, err := f.dir()
		if err != nil {
			t.Fatal(err)
		}
		for file, want := range map[string]string{"memory.memsw.limit_in_bytes": "33554432\n", "memory.swap.max": "0\n"} {
			got, err := os.ReadFile(filepath.Join(dir, name, file))
			if err == nil && string(got) != want {
				t.Errorf("%s is %q", file, got)
			}
		}
		var c console
		p, err := startProcess(command{path: inPath(t, "sh"), args: []string{"-c", "until grep -q " + name + " /proc/self/cgroup; do sleep 0.01; done; x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo survived"}, uid: -1, group: g, output: &c})
		if err != nil {
			t.Fatal(err)
		}
		<-p.done
		if strings.Contains(c.summary(), "survived") || !g.outOfMemory() {
			t.Errorf("%s, out of memory: %v%s", p.exit(), g.outOfMemory(), c.summary())
		}
		if err := g.destroy(); err != nil {
			t.Error(err)
		}
	})
	t.Run("destroy kills", func(t *testing.T) {
		g, err := f.create(cgroupName(os.Getpid(), 1<<40+1), 64)
		if err != nil {
			t.Fatal(err)
		}
		p, err := startProcess(command{path: inPath(t, "sleep"), args: []string{"1000"}, uid: -1, group: g})
		if err != nil {
			t.Fatal(err)
		}
		if g.outOfMemory() {
			t.Error("out of memory with nothing in it")
		}
		if err := g.destroy(); err != nil {
			t.Error(err)
		}
		<-p.done
		if !strings.Contains(p.exit(), "killed") {
			t.Errorf("ended by %s", p.exit())
		}
	})
	t.Run("sweep", func(t *testing.T) {
		// Process ids end at four million.
		dead, alive := cgroupName(1<<30, 7), cgroupName(os.Getpid(), 1<<40+2)
		for _, name := range []string{dead, alive} {
			if _, err := f.create(name, 64); err != nil {
				t.Fatal(err)
			}
		}
		if err := sweepCgroups(f); err != nil {
			t.Error(err)
		}
		dir, err := f.dir()
		if err != nil {
			t.Fatal(err)
		}
		if isDir(filepath.Join(dir, dead)) || !isDir(filepath.Join(dir, alive)) {
			t.Error("the wrong groups are left")
		}
		g, err := f.load(alive)
		if err != nil {
			t.Fatal(err)
		}
		if err := g.destroy(); err != nil {
			t.Error(err)
		}
	})
}
