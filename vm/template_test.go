package vm

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// emptyTemplate returns a template of nothing.
func emptyTemplate(t testing.TB) *template {
	t.Helper()
	made, err := newTemplate(1, 1)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// warmUp returns when there is a template for a build and nothing is being made.
func warmUp(t testing.TB, r *Runner, spec *Spec) {
	t.Helper()
	p, err := r.platform(t.Context(), r.native)
	if err != nil {
		t.Fatal(err)
	}
	m, err := p.machineFor(spec)
	if err != nil {
		t.Fatal(err)
	}
	warmUpMachine(t, r, p, m)
}

func warmUpMachine(t testing.TB, r *Runner, p *platform, m machine) {
	t.Helper()
	r.templates.want(p, m, r.templateMaker(p, m))
	r.templates.mu.Lock()
	s := r.templates.byID[p.templateID(m)]
	r.templates.mu.Unlock()
	<-s.done
	if r.templates.mu.Lock(); s.err != nil {
		t.Error(s.err)
	}
	r.templates.mu.Unlock()
}

func closed(f *os.File) bool {
	_, err := f.Stat()
	return errors.Is(err, os.ErrClosed)
}

func TestTemplateID(t *testing.T) {
	p := func() *platform {
		return &platform{qemu: qemu{id: "q"}, boot: &bootFiles{kernelHash: "k", initrdHash: "i"}}
	}
	m := machine{arch: archX8664, accel: "tcg", vcpus: 2, memoryMiB: 2560}
	base := p().templateID(m)
	if p().templateID(m) != base {
		t.Error("not the same for the same")
	}
	for name, change := range map[string]func(p *platform, m *machine){
		"QEMU":      func(p *platform, m *machine) { p.qemu.id = "other" },
		"kernel":    func(p *platform, m *machine) { p.boot.kernelHash = "other" },
		"initramfs": func(p *platform, m *machine) { p.boot.initrdHash = "other" },
		"memory":    func(p *platform, m *machine) { m.memoryMiB++ },
		"vcpus":     func(p *platform, m *machine) { m.vcpus++ },
		"accel":     func(p *platform, m *machine) { m.accel = "kvm" },
		"on demand": func(p *platform, m *machine) { m.onDemand = true },
		"frequency": func(p *platform, m *machine) { m.tscKHz = 1000 },
		"disk":      func(p *platform, m *machine) { m.scratchGiB = 2 },
	} {
		q, n := p(), m
		change(q, &n)
		if q.templateID(n) == base {
			t.Errorf("%s makes no difference", name)
		}
	}
}

// What is sealed cannot be changed, not even through a descriptor that was
// opened for writing or by punching holes.
func TestSeal(t *testing.T) {
	made := emptyTemplate(t)
	defer made.release()
	for _, f := range made.files() {
		if _, err := f.WriteString("template"); err != nil {
			t.Fatal(err)
		}
	}
	if err := made.seal(); err != nil {
		t.Fatal(err)
	}
	for _, f := range made.files() {
		checkSealed(t, f)
	}
}

func checkSealed(t *testing.T, f *os.File) {
	t.Helper()
	w, err := os.OpenFile("/proc/self/fd/"+itoa(int(f.Fd())), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.WriteString("X"); !errors.Is(err, unix.EPERM) {
		t.Errorf("write: %v", err)
	}
	if err := unix.Fallocate(int(w.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4); !errors.Is(err, unix.EPERM) {
		t.Errorf("punch a hole: %v", err)
	}
	if err := w.Truncate(0); !errors.Is(err, unix.EPERM) {
		t.Errorf("truncate: %v", err)
	}
	r, err := reopen(f)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b := make([]byte, 8)
	if _, err := io.ReadFull(r, b); err != nil || string(b) != "template" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestAnswers(t *testing.T) {
	a := &answers{path: filepath.Join(t.TempDir(), qualifiedFile)}
	if _, ok, err := a.get("k"); ok || err != nil {
		t.Errorf("of nothing: %v, %v", ok, err)
	}
	yes := answer{Works: true, When: time.Unix(1_000_000, 0).UTC()}
	want := answer{Works: false, Reason: "hangs", When: time.Now().Truncate(time.Second).UTC()}
	old := answer{Works: false, Reason: "hangs", When: want.When.Add(-noLasts)}
	for key, put := range map[string]answer{"yes": yes, "old": old} {
		if err := a.put(key, put); err != nil {
			t.Fatal(err)
		}
		if got, ok, err := a.get(key); ok != put.Works || err != nil || got != put {
			t.Errorf("%s: %v, %v, %v", key, got, ok, err)
		}
	}
	if err := a.put("k", want); err != nil {
		t.Fatal(err)
	}
	if got, ok, err := a.get("k"); !ok || err != nil || got != want {
		t.Errorf("%v, %v, %v", got, ok, err)
	}
	for i := range 3 * maxAnswers {
		if err := a.put("old"+itoa(i), want); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := a.readLocked(); err != nil || len(all) > maxAnswers {
		t.Errorf("%d answers are kept, %v", len(all), err)
	}
	for _, damage := range []string{"", "null", "{", `{"k": 7}`} {
		if err := os.WriteFile(a.path, []byte(damage), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, ok, err := a.get("k"); ok || err != nil {
			t.Errorf("%q: %v, %v", damage, ok, err)
		}
		if err := a.put("k", want); err != nil {
			t.Errorf("%q: %v", damage, err)
		}
	}
}

// allocated returns the bytes that a file in memory takes.
func allocated(t testing.TB, f *os.File) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestCopySparse(t *testing.T) {
	const size = 300 << 20
	from, err := memfd("from", size)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	for off, text := range map[int64]string{0: "start", 150<<20 + 7: "middle", size - 5: "end.."} {
		if _, err := from.WriteAt([]byte(text), off); err != nil {
			t.Fatal(err)
		}
	}
	to, err := memfd("to", size)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if err := copySparse(to, from, size); err != nil {
		t.Fatal(err)
	}
	a, b := sha256.New(), sha256.New()
	for h, f := range map[io.Writer]*os.File{a: from, b: to} {
		if _, err := io.Copy(h, io.NewSectionReader(f, 0, size)); err != nil {
			t.Fatal(err)
		}
	}
	if allocated(t, to) > 16<<20 {
		t.Errorf("the copy takes %d bytes", allocated(t, to))
	}
	if !bytes.Equal(a.Sum(nil), b.Sum(nil)) {
		t.Error("the copy differs")
	}
}
