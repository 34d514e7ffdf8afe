package vm

import (
	"io"
	"os"
	"path/filepath"
	"testing"
)

// Templates outlive their Runner; one that is damaged reaches no guest; and when
// a part is replaced under a running server, guests are made of the new one.
func TestTemplatesAreKept(t *testing.T) {
	if testing.Short() {
		t.Skip("tests that boot guests are left out with -short")
	}
	state := ownState(t)
	shell, err := findShell(state, "", archX8664)
	if err != nil {
		t.Fatal(err)
	}
	busybox := filepath.Join(t.TempDir(), "busybox")
	copyFile(t, busybox, shell)
	change := func(c *Config) { c.StateDir, c.Busybox = state, busybox }
	blobs := memBlobs{}
	spec := func(id string) *Spec { return shellSpec(id, "nproc > $out", blobs, file("x"), t) }
	saved := func() []string {
		files, err := filepath.Glob(filepath.Join(state, templatesDir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		return files
	}
	run := func(t *testing.T, r *Runner, restored bool) {
		t.Helper()
		res, err := r.Run(t.Context(), spec("build"), io.Discard, new(memOutputs))
		if err != nil || res.Restored != restored {
			t.Fatalf("%+v, %v; want restored: %v", res, err, restored)
		}
	}
	t.Run("made", func(t *testing.T) {
		r := newTestRunner(t, blobs, change)
		run(t, r, false) // it does not wait for the template
		warmUp(t, r, spec("warm"))
		run(t, r, true)
		r.templates.wait.Wait() // until it is written
		if len(saved()) != 1 {
			t.Errorf("kept: %q", saved())
		}
	})
	t.Run("read", func(t *testing.T) {
		before := saved()
		r := newTestRunner(t, blobs, change)
		run(t, r, true)
		if after := saved(); len(after) != 1 || after[0] != before[0] {
			t.Errorf("kept: %q", after)
		}
	})
	t.Run("replaced", func(t *testing.T) {
		before := saved()
		r := newTestRunner(t, blobs, change)
		run(t, r, true)
		generation := generationOf(t, r)
		// A distribution replaces a file by another one.
		fresh := busybox + ".new"
		copyFile(t, fresh, shell)
		f, err := os.OpenFile(fresh, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		// The padding of an ELF header means nothing, but it is another file.
		if _, err := f.WriteAt([]byte{1}, 10); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(fresh, busybox); err != nil {
			t.Fatal(err)
		}
		run(t, r, false) // without a restart, and without waiting
		if generationOf(t, r) == generation {
			t.Error("the old shell is in use")
		}
		warmUp(t, r, spec("warm"))
		run(t, r, true)
		r.templates.wait.Wait()
		if after := saved(); len(after) != 1 || after[0] == before[0] {
			t.Errorf("kept: %q, before %q", after, before)
		}
		if ready, failures := r.templates.count(); ready != 1 || len(failures) != 0 {
			t.Errorf("%d are ready, %v", ready, failures)
		}
	})
	t.Run("damaged", func(t *testing.T) {
		path := saved()[0]
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text[len(text)/2] ^= 1
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		r := newTestRunner(t, blobs, change)
		if r.templateMaker(nil, sized(2, 2560)).load(filepath.Base(path)) != nil {
			t.Error("a damaged template was read")
		}
		if len(saved()) != 0 {
			t.Errorf("it is still there: %q", saved())
		}
	})
}

func copyFile(t *testing.T, to, from string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, text, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func generationOf(t *testing.T, r *Runner) string {
	t.Helper()
	g, err := r.Generation(t.Context(), "x86_64-linux")
	if err != nil {
		t.Fatal(err)
	}
	return g
}
