package vm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// tool returns the path of a program that a test cannot do without.
func tool(t testing.TB, name, debianPackage string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		// Debian keeps the tools of file systems where users do not look.
		path, err = exec.LookPath("/usr/sbin/" + name)
	}
	if err != nil {
		t.Fatalf("%s is missing, install it: apt install %s", name, debianPackage)
	}
	return path
}

// TestScratchIsClean has e2fsck look at a disk of each size.
func TestScratchIsClean(t *testing.T) {
	fsck := tool(t, "e2fsck", "e2fsprogs")
	for mib := 1024; mib <= MaxScratchMiB; mib *= 2 {
		t.Run(fmt.Sprint(mib), func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "scratch")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(writeScratch(f, mib>>10), f.Close()); err != nil {
				t.Fatal(err)
			}
			checkScratchFile(t, path, int64(mib)<<20)
			if out, err := exec.Command(fsck, "-f", "-n", path).CombinedOutput(); err != nil {
				t.Errorf("e2fsck: %v\n%s", err, out)
			}
		})
	}
}

// checkScratchFile says whether a new scratch disk is whole and sparse.
func checkScratchFile(t *testing.T, path string, size int64) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() != size {
		t.Errorf("file has %d bytes, want %d", info.Size(), size)
	}
	if used := info.Sys().(*syscall.Stat_t).Blocks * 512; used > 1<<20 {
		t.Errorf("empty disk takes %d bytes of the host's", used)
	}
}

func TestScratchSize(t *testing.T) {
	for _, c := range []struct {
		mib  int
		want int64 // GiB; 0: refused
	}{
		{-1, 0}, {0, 0}, {1, 1}, {1024, 1}, {1025, 2}, {3000, 4}, {50 << 10, 64}, {64 << 10, 64},
		{MaxScratchMiB, 1024}, {MaxScratchMiB + 1, 0}, {1 << 62, 0},
	} {
		got, err := ScratchSize(c.mib)
		if got != c.want<<30 || (err != nil) != (c.want == 0) {
			t.Errorf("ScratchSize(%d) = %d, %v; want %d GiB", c.mib, got, err, c.want)
		}
	}
}

// The file of a scratch disk is ours alone, and has no name.
func TestScratchFile(t *testing.T) {
	r := &Runner{cfg: Config{RuntimeDir: t.TempDir()}}
	f, err := r.scratchFile(func(f *os.File) error { return writeScratch(f, 1) })
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Mode() != 0o600 || info.Size() != 1<<30 {
		t.Errorf("%v, %v", info, err)
	}
	full := errors.New("the disk is full")
	if _, err := r.scratchFile(func(*os.File) error { return full }); !errors.Is(err, full) {
		t.Errorf("got %v", err)
	}
	if left, err := os.ReadDir(r.cfg.RuntimeDir); len(left) > 0 || err != nil {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestScratchTemplateCut cuts a template: that is an error, not a panic.
func TestScratchTemplateCut(t *testing.T) {
	good, err := scratchTemplates.ReadFile("scratch/ext4-1.z")
	if err != nil {
		t.Fatal(err)
	}
	for i := range good {
		f, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		if err := writeTemplate(f, good[:i], 1<<30); err == nil {
			t.Errorf("template cut at %d was taken", i)
		}
		f.Close()
	}
}

func BenchmarkScratch(b *testing.B) {
	for _, gib := range []int{4, 64, MaxScratchMiB >> 10} {
		b.Run(fmt.Sprintf("%dGiB", gib), func(b *testing.B) {
			for b.Loop() {
				f, err := os.CreateTemp(b.TempDir(), "")
				if err == nil {
					err = errors.Join(writeScratch(f, gib), f.Close(), os.Remove(f.Name()))
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
