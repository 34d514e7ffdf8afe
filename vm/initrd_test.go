package vm

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestWriteInitrd(t *testing.T) {
	dir := t.TempDir()
	writeFiles(t, dir, map[string][]byte{"nbd": []byte("the program"), "busybox": []byte("sh")})
	var b bytes.Buffer
	modules := []module{{"virtio", []byte("v")}, {"erofs", []byte("ero")}}
	if err := writeInitrd(&b, filepath.Join(dir, "nbd"), filepath.Join(dir, "busybox"), modules, []module{{"kvm", []byte("k")}}); err != nil {
		t.Fatal(err)
	}
	if b.Len()%4 != 0 {
		t.Errorf("%d bytes are not a multiple of four", b.Len())
	}
	got := map[string]string{}
	err := readCpio(bytes.NewReader(b.Bytes()), func(name string, r io.Reader) error {
		data, err := io.ReadAll(r)
		got[name] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"init": "the program", "busybox": "sh", "modules/000-virtio.ko": "v", "modules/001-erofs.ko": "ero", "modules.kvm/000-kvm.ko": "k"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Guests that run guests have the folder that tells them so, whether KVM is a
// module or a part of their kernel.
func TestNestedInitrd(t *testing.T) {
	for _, kvm := range []map[string][]byte{
		{"kvm.ko": koFile(), "kvm-intel.ko": koFile("depends=kvm")},
		{"erofs.ko": koFile()},
	} {
		dir := t.TempDir()
		writeFiles(t, dir, kvm)
		writeFiles(t, dir, map[string][]byte{"shell": []byte("sh")})
		b := new(bootFiles)
		of := &base{arch: archX8664, kernel: Kernel{Modules: dir}, shell: filepath.Join(dir, "shell")}
		if err := b.addNested(t.TempDir(), of, of.shell); err != nil {
			t.Fatal(err)
		}
		text := contents(t, b.nested)
		if !bytes.Contains(text, []byte("modules.kvm\x00")) || bytes.Contains(text, []byte("kvm_intel")) != (kvm["kvm.ko"] != nil) {
			t.Errorf("with %v: %q", slices.Collect(maps.Keys(kvm)), text)
		}
		if err := b.close(); err != nil {
			t.Error(err)
		}
	}
}

func TestWriteInitrdMissing(t *testing.T) {
	err := writeInitrd(io.Discard, filepath.Join(t.TempDir(), "none"), "", nil, nil)
	if !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if err := writeInitrd(io.Discard, t.TempDir(), "", nil, nil); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("got %v", err)
	}
}

func TestFindShell(t *testing.T) {
	dynamic, err := exec.LookPath("ls")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ configured, want string }{
		{dynamic, "not statically linked"},
		{"/nonexistent/busybox", "there is no busybox /nonexistent/busybox"},
	} {
		_, err := findShell(t.TempDir(), tt.configured, archX8664)
		var missing *MissingError
		if !errors.As(err, &missing) || !strings.Contains(err.Error(), tt.want) || !strings.Contains(missing.Hint, "apt install busybox-static") {
			t.Errorf("%s: %v", tt.configured, err)
		}
	}
}

func TestNamelessFile(t *testing.T) {
	dir := t.TempDir()
	f, sum, err := namelessFile(dir, func(w io.Writer) error {
		_, err := io.WriteString(w, "abc")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if sum != "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" {
		t.Errorf("hash %s", sum)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("it has a name: %v, %v", left, err)
	}
	again, err := reopen(f)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if data, err := io.ReadAll(again); err != nil || string(data) != "abc" {
		t.Errorf("%q, %v", data, err)
	}
}
