package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"nbd/nixproto/nar"
	"nbd/vm/link"
)

// must fails the test with the first error.
func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// trees are what testdata/nar has the archives of.
var trees = map[string]func(t *testing.T, path string){
	"file": func(t *testing.T, path string) {
		must(t, os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755))
	},
	"empty": func(t *testing.T, path string) {
		must(t, os.WriteFile(path, nil, 0o644))
	},
	"symlink": func(t *testing.T, path string) {
		must(t, os.Symlink("/nix/store/../x", path))
	},
	"tree": func(t *testing.T, path string) {
		must(t, os.Mkdir(path, 0o755), os.Mkdir(path+"/a", 0o755), os.Mkdir(path+"/empty", 0o755), os.Mkdir(path+"/sticky", 0o755))
		must(t, os.Symlink("..", path+"/a/up"), os.Symlink("/etc/passwd", path+"/a/abs"))
		for i, size := range []int{0, 1, 7, 8, 9, 4095, 4096, 4097, 300000} {
			must(t, os.WriteFile(fmt.Sprintf("%s/size-%d", path, i), bytes.Repeat([]byte{byte(i)}, size), 0o644))
		}
		for _, mode := range []os.FileMode{0, 0o010, 0o100, 0o555, 0o666} {
			name := fmt.Sprintf("%s/mode-%03o", path, mode)
			must(t, os.WriteFile(name, []byte("m"), 0o644), os.Chmod(name, mode))
		}
		must(t, os.Link(path+"/size-1", path+"/hardlink"))
		for _, name := range []string{"Case", "case", "!x", "a.b", "a-b", "-dash", "new\nline", "bad\xffutf8", " sp ", strings.Repeat("l", 255)} {
			must(t, os.WriteFile(path+"/"+name, []byte(name), 0o644))
		}
		must(t, os.Chmod(path+"/sticky", 0o777|os.ModeSticky), os.Chmod(path+"/empty", 0o000))
	},
}

// dump returns the NAR of an object.
func dump(t *testing.T, path string) ([]byte, error) {
	t.Helper()
	parent, err := os.Open(filepath.Dir(path))
	must(t, err)
	defer parent.Close()
	var b bytes.Buffer
	err = dumpTree(&b, parent, filepath.Base(path), "/nix/store/x", uint32(os.Getuid()))
	return b.Bytes(), err
}

// TestDumpIsNix compares archives with those of nix-store --dump.
func TestDumpIsNix(t *testing.T) {
	for name, make := range trees {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), name)
			make(t, path)
			if dir := os.Getenv("NBD_KEEP_TREES"); dir != "" { // to record testdata/nar
				make(t, filepath.Join(dir, name))
			}
			got, err := dump(t, path)
			must(t, err)
			want, err := os.ReadFile(filepath.Join("testdata/nar", name+".nar"))
			must(t, err)
			if !bytes.Equal(got, want) {
				t.Errorf("%d bytes, not the %d of Nix", len(got), len(want))
			}
		})
	}
}

func TestDumpDepth(t *testing.T) {
	deep := func(n int) string {
		root := filepath.Join(t.TempDir(), "x")
		must(t, os.MkdirAll(root+strings.Repeat("/d", n), 0o755))
		return root
	}
	// The deepest entry that an archive may have.
	b, err := dump(t, deep(nar.MaxDepth))
	must(t, err)
	index, _, err := nar.ReadIndex(bytes.NewReader(b))
	must(t, err)
	if len(index) != nar.MaxDepth+1 {
		t.Errorf("%d entries", len(index))
	}
	_, err = dump(t, deep(nar.MaxDepth+1))
	wantRefused(t, err, link.OutputRefused, "nested more than 64 levels deep")
}

func wantRefused(t *testing.T, err error, kind link.Kind, text string) {
	t.Helper()
	var bad *outputError
	if !errors.As(err, &bad) || bad.kind != kind || !strings.Contains(bad.msg, text) {
		t.Errorf("got %v, want %s with %q", err, kind, text)
	}
}

func TestDumpRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		make func(path string) error
		want string
	}{
		{"fifo", func(p string) error { return unix.Mkfifo(p, 0o644) }, `file "/nix/store/x/y" has an unsupported type`},
		{"socket", func(p string) error { return unix.Mknod(p, unix.S_IFSOCK|0o644, 0) }, `file "/nix/store/x/y" has an unsupported type`},
		{"device", func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 3))) }, `file "/nix/store/x/y" has an unsupported type`},
		{"owner", func(p string) error { return errors.Join(os.WriteFile(p, nil, 0o644), os.Chown(p, 12345, 0)) }, `invalid ownership on file "/nix/store/x/y"`},
		{"symlink's owner", func(p string) error { return errors.Join(os.Symlink("y", p), os.Lchown(p, 12345, 0)) }, `invalid ownership on file "/nix/store/x/y"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "x")
			must(t, os.Mkdir(root, 0o755), tt.make(root+"/y"))
			_, err := dump(t, root)
			wantRefused(t, err, link.OutputRefused, tt.want)
		})
	}
}

func TestCheckOutputs(t *testing.T) {
	order := &link.BuildOrder{
		DrvPath: "/nix/store/d.drv",
		Outputs: []link.Output{{Name: "out", Path: "/nix/store/o"}, {Name: "dev", Path: "/nix/store/p"}},
	}
	uid := uint32(os.Getuid())
	check := func(t *testing.T, edit func(dev string) error) error {
		root := t.TempDir()
		must(t, os.MkdirAll(root+"/nix/store/o", 0o755), edit(root+"/nix/store/p"))
		return checkOutputs(root, order, uid)
	}
	mkdir := func(mode os.FileMode) func(string) error {
		return func(p string) error { return errors.Join(os.Mkdir(p, 0o755), os.Chmod(p, mode)) }
	}
	must(t, check(t, mkdir(0o755)), check(t, mkdir(0o700)), check(t, mkdir(0o755|os.ModeSticky)))
	must(t, check(t, func(p string) error { return os.Symlink("/nonexistent", p) }))
	const suspicious = `suspicious ownership or permission on "/nix/store/p" for output 'dev'; rejecting this build output`
	wantRefused(t, check(t, mkdir(0o775)), link.OutputRefused, suspicious)
	wantRefused(t, check(t, mkdir(0o757)), link.OutputRefused, suspicious)
	wantRefused(t, check(t, func(p string) error { return errors.Join(os.Mkdir(p, 0o755), os.Chown(p, 12345, 0)) }), link.OutputRefused, suspicious)
	wantRefused(t, check(t, func(string) error { return nil }), link.OutputMissing,
		`builder for '/nix/store/d.drv' failed to produce output path for output 'dev' at "/nix/store/p"`)
}

// TestSink writes outputs into a file in the place of the output disk.
func TestSink(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	must(t, os.WriteFile(disk, nil, 0o600))
	root := filepath.Join(dir, "root")
	must(t, os.MkdirAll(root+"/nix/store", 0o755))
	order := &link.BuildOrder{}
	var want bytes.Buffer
	var infos []link.OutputInfo
	// Sizes around the buffer's and the alignment's.
	for i, size := range []int{0, 3968, sinkBuffer - 128, sinkBuffer, 3*sinkBuffer + 5} {
		name := fmt.Sprintf("o%d", i)
		path := "/nix/store/" + name
		must(t, os.WriteFile(root+path, bytes.Repeat([]byte{byte('a' + i)}, size), 0o644))
		order.Outputs = append(order.Outputs, link.Output{Name: name, Path: path})
		b, err := dump(t, root+path)
		must(t, err)
		infos = append(infos, link.OutputInfo{Name: name, Size: int64(len(b))})
		want.Write(b)
		want.Write(make([]byte, -len(b)&(link.OutputAlign-1)))
	}
	s, err := openSink(disk)
	must(t, err)
	got, err := sendOutputs(s, root, order, uint32(os.Getuid()))
	must(t, err, s.close())
	if diff := cmp.Diff(infos, got); diff != "" {
		t.Error(diff)
	}
	b, err := os.ReadFile(disk)
	must(t, err)
	if !bytes.Equal(b, want.Bytes()) {
		t.Errorf("the disk's %d bytes are not the %d wanted", len(b), want.Len())
	}
}

func TestIsIOError(t *testing.T) {
	for msg, want := range map[string]bool{
		"3,512,4242,-;I/O error, dev vda, sector 8 op 0x0:(READ) flags 0x80700 phys_seg 1 prio class 2\n": true,
		"3,513,4243,-;Buffer I/O error on dev vdb, logical block 1, async page read\n":                    true,
		"2,514,4244,-;EXT4-fs error (device vdb): ext4_lookup:1855: inode #2: comm sh: deleted inode\n":   true,
		"3,515,4245,-;erofs: (device vda): erofs_readdir: corrupted dirent\n":                             true,
		"3,515,4245,-;erofs (device vda): erofs_readdir: corrupted dirent\n":                              true,
		"4,515,4245,-;EXT4-fs warning (device vdb): ext4_end_bio:343: I/O error 10 writing to inode 12\n": true,
		"3,515,4245,-;blk_update_request: I/O error, dev vda, sector 8 op 0x0:(READ) flags 0x80700\n":     true,
		// What a builder can have the kernel say.
		"6,518,4248,-;I/O error, dev [77]: segfault at 0 ip 0000000000401000 sp 00007ffc error 6 in a[1]\n": false,
		"6,519,4249,-;EXT4-fs error ([77]: segfault at 0 ip 0000000000401000 sp 00007ffc error 6 in a[1]\n": false,
		"3,520,4250,-;tmpfs: Unknown parameter 'I/O error, dev vda'\n":                                      false,
		"6,516,4246,-;EXT4-fs (vdb): mounted filesystem without journal. Quota mode: none.\n":               false,
		"6,517,4247,-;erofs: (device vda): mounted with root inode @ nid 36.\n":                             false,
	} {
		if got := isIOError(msg); got != want {
			t.Errorf("%q: %v", msg, got)
		}
	}
}
