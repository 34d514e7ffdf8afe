package vm

import (
	"errors"
	"fmt"
	"io/fs"
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
			size, err := NewScratch(path, mib)
			if err != nil {
				t.Fatal(err)
			}
			if size != int64(mib)<<20 {
				t.Errorf("size = %d, want %d MiB", size, mib)
			}
			checkScratchFile(t, path, size)
			if out, err := exec.Command(fsck, "-f", "-n", path).CombinedOutput(); err != nil {
				t.Errorf("e2fsck: %v\n%s", err, out)
			}
		})
	}
}

// checkScratchFile says whether a new scratch disk is private and sparse.
func checkScratchFile(t *testing.T, path string, size int64) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() != size {
		t.Errorf("file has %d bytes, want %d", info.Size(), size)
	}
	if info.Mode() != 0o600 {
		t.Errorf("mode = %v, want 0600", info.Mode())
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

func TestScratchErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "scratch")
	if _, err := NewScratch(path, 0); err == nil {
		t.Error("a disk of no size was made")
	}
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewScratch(path, 1); !errors.Is(err, fs.ErrExist) {
		t.Errorf("existing file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "mine" {
		t.Errorf("existing file became %q, %v", b, err)
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

func BenchmarkNewScratch(b *testing.B) {
	for _, mib := range []int{4 << 10, 64 << 10, MaxScratchMiB} {
		b.Run(fmt.Sprintf("%dGiB", mib>>10), func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "scratch")
			for b.Loop() {
				if _, err := NewScratch(path, mib); err != nil {
					b.Fatal(err)
				}
				if err := os.Remove(path); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
