package vm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newTemplate returns a template of nothing.
func newTemplate(t *testing.T) *template {
	t.Helper()
	ram, err := memfd("ram", 4096)
	if err != nil {
		t.Fatal(err)
	}
	state, err := memfd("state", 0)
	if err != nil {
		t.Fatal(err)
	}
	return &template{ram: ram, state: state, users: 1}
}

func closed(f *os.File) bool {
	_, err := f.Stat()
	return errors.Is(err, os.ErrClosed)
}

func TestTemplatesAreMadeOnce(t *testing.T) {
	all := templates{byID: map[string]*templateSlot{}}
	var made atomic.Int32
	release := make(chan struct{})
	bad := newTemplate(t)
	make := func() (*template, error) {
		made.Add(1)
		<-release
		return bad, nil
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			got, err := all.get(t.Context(), "a", make)
			if err != nil {
				t.Error(err)
				return
			}
			got.release()
		})
	}
	// Who does not want to wait does not.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := all.get(ctx, "a", make); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	close(release)
	wg.Wait()
	if made.Load() != 1 {
		t.Errorf("made %d times", made.Load())
	}
	if ready, failures := all.count(); ready != 1 || len(failures) != 0 {
		t.Errorf("%d ready, %v", ready, failures)
	}
	// One that is dropped stays whole while somebody uses it.
	used, err := all.get(t.Context(), "a", make)
	if err != nil {
		t.Fatal(err)
	}
	all.drop("a", used)
	all.drop("a", used) // and once is enough
	if closed(bad.ram) {
		t.Error("closed under its user")
	}
	used.release()
	if !closed(bad.ram) || !closed(bad.state) {
		t.Error("not closed after its last use")
	}
	bad = newTemplate(t)
	if again, err := all.get(t.Context(), "a", make); err != nil || made.Load() != 2 {
		t.Errorf("not made again: %v", err)
	} else {
		again.release()
	}
	all.close()
	if !closed(bad.ram) {
		t.Error("not closed at the end")
	}
}

func TestTemplateFailureIsRemembered(t *testing.T) {
	all := templates{byID: map[string]*templateSlot{}}
	made := 0
	make := func() (*template, error) {
		made++
		return nil, errors.New("no luck")
	}
	for range 3 {
		if _, err := all.get(t.Context(), "a", make); err == nil || err.Error() != "no luck" {
			t.Errorf("got %v", err)
		}
	}
	if made != 1 {
		t.Errorf("tried %d times", made)
	}
	if ready, failures := all.count(); ready != 0 || len(failures) != 1 {
		t.Errorf("%d ready, %v", ready, failures)
	}
	all.byID["a"].at = time.Now().Add(-2 * templateRetry)
	all.get(t.Context(), "a", make)
	if made != 2 {
		t.Errorf("tried %d times after a while", made)
	}
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
		"frequency": func(p *platform, m *machine) { m.tscKHz = 1000 },
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
	f, err := memfd("test", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("template"); err != nil {
		t.Fatal(err)
	}
	if err := seal(f); err != nil {
		t.Fatal(err)
	}
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
	if b, err := io.ReadAll(r); err != nil || string(b) != "template" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestAnswers(t *testing.T) {
	a := &answers{path: filepath.Join(t.TempDir(), qualifiedFile)}
	if _, ok, err := a.get("k"); ok || err != nil {
		t.Errorf("of nothing: %v, %v", ok, err)
	}
	want := answer{Works: false, Reason: "hangs", When: time.Unix(1_000_000, 0).UTC()}
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
