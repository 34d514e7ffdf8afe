package vm

import (
	"debug/elf"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A part that is replaced, or imported in the place of the host's, changes the
// stamp; one that is not there for a while does not.
func TestStamp(t *testing.T) {
	dir := t.TempDir()
	cfg := &Config{StateDir: dir, Kernel: "6.1.0-x"}
	at := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string) { t.Helper(); writeFiles(t, dir, map[string][]byte{name: bzImage("6.1.0-x")}) }
	for _, name := range []string{"qemu", "sh", "kernels/6.1.0-x/" + importedImage, "kernels/6.1.0-x/" + importedFiles + "/none"} {
		write(name)
	}
	b := &base{arch: archX8664, qemu: qemu{Path: at("qemu")}, shell: at("sh")}
	b.stamped = b.stamp(cfg)
	if b.stamped == "" || b.stamp(cfg) != b.stamped {
		t.Fatalf("stamps %q, %q", b.stamped, b.stamp(cfg))
	}
	for _, name := range []string{"qemu", "sh", "kernels/6.1.0-x/" + importedImage} {
		if err := os.Rename(at(name), at("old")); err != nil {
			t.Fatal(err)
		}
		if b.stamp(cfg) != b.stamped {
			t.Errorf("%s is away", name)
		}
		write(name)
		if now := b.stamp(cfg); now == b.stamped {
			t.Errorf("%s is another one", name)
		} else {
			b.stamped = now
		}
	}
	write("shells/x86_64/busybox")
	if b.stamp(cfg) == b.stamped {
		t.Error("a shell was imported")
	}
}

// Parts for guests of another architecture that come while the Runner runs are
// noticed, and so is a kernel in the place of one that did not boot.
func TestPartsAreNoticed(t *testing.T) {
	program := fakeProgram(t)
	if err := os.Link(program, filepath.Join(filepath.Dir(program), archAArch64.qemu)); err != nil {
		t.Fatal(err)
	}
	r := newFakeRunner(t, program, "", nil)
	r.cfg.AgentBinary = r.cfg.Binary
	state, release := r.cfg.StateDir, "6.1.0-arm64"
	is := func(offered bool, why string, not ...string) {
		t.Helper()
		r.notice()
		r.running.Wait() // for who tries guests
		s := r.Systems()[2]
		if s.Name != "aarch64-linux" || s.Offered != offered || r.Offers(s.Name) != offered || !strings.Contains(s.WhyNot, why) {
			t.Fatalf("want %v and %q: %+v", offered, why, s)
		}
		for _, n := range not {
			if strings.Contains(s.WhyNot, n) {
				t.Errorf("%q is in %+v", n, s)
			}
		}
	}
	is(false, "no kernel for aarch64")

	writeFiles(t, filepath.Join(state, kernelsDir, release), map[string][]byte{
		importedImage: arm64Image(), filepath.Join(importedFiles, "erofs.ko"): []byte("damaged"),
	})
	is(false, "no static busybox", "no kernel")

	from := t.TempDir()
	importFiles := func(files map[string][]byte) {
		t.Helper()
		writeFiles(t, from, files)
		if _, err := Import(state, from); err != nil {
			t.Fatal(err)
		}
	}
	importFiles(map[string][]byte{"busybox": elfProgram(elf.EM_AARCH64)})
	is(false, "erofs", "not set up") // it was set up and tried

	importFiles(map[string][]byte{"Image": arm64Image(), "erofs.ko": koFileFor(elf.EM_AARCH64, "vermagic="+release+" SMP aarch64")})
	is(true, "")
}
