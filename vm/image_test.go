package vm

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// bytesOf returns n bytes that differ from place to place.
func bytesOf(n int) string {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8)})
	r.Read(b)
	return string(b)
}

// nested returns a file in so many directories.
func nested(depth int) *tree {
	n := file("deep")
	for range depth {
		n = dir(map[string]*tree{"d": n})
	}
	return n
}

// many returns a directory of n entries with names of the given length.
func many(n, nameLen int, kid *tree) *tree {
	kids := make(map[string]*tree, n)
	for i := range n {
		name := fmt.Sprintf("%06d", i)
		kids[name+strings.Repeat("x", max(0, nameLen-len(name)))] = kid
	}
	return dir(kids)
}

// store returns a tree whose entries are store paths with made up hashes.
func store(kids ...*tree) *tree {
	m := make(map[string]*tree)
	for i, k := range kids {
		m[fmt.Sprintf("%032d-p%d", i, i)] = k
	}
	return dir(m)
}

// imageTrees are the trees that all oracles are asked about.
var imageTrees = map[string]func() *tree{
	"nothing": func() *tree { return store() },
	"kinds":   func() *tree { return store(file("a"), program("b"), symlink("c"), dir(nil), file("")) },
	"names around the dots": func() *tree {
		kids := make(map[string]*tree)
		for _, s := range []string{"!", "!x", "+x", "-", "-x", ".\x01", ".!", ".-", "...", ".a", "..a", ".. ",
			"0", "A", "a b", "\"", "\\", "\n", "~", "ä", "a", "aa", "ab", "b"} {
			kids[s] = file(s)
		}
		return store(dir(kids), dir(map[string]*tree{"!": dir(nil)}))
	},
	"sizes of files": func() *tree {
		var kids []*tree
		for _, n := range []int{0, 1, 7, 8, 9, 4063, 4064, 4065, 4095, 4096, 4097, 8191, 8192, 8193, 100_000} {
			kids = append(kids, file(bytesOf(n)), program(bytesOf(n)))
		}
		return store(kids...)
	},
	"sizes of targets": func() *tree {
		var kids []*tree
		for _, n := range []int{1, 31, 32, 33, 255, 1000, 4063, 4064, 4065, 4094, 4095} {
			kids = append(kids, symlink(strings.Repeat("t", n)), file("x"))
		}
		return store(kids...)
	},
	// 24 bytes and 3 of names are the dots', 12 belong to each entry.
	"sizes of directories": func() *tree {
		var kids []*tree
		for n := 1; n <= 255; n += 3 {
			kids = append(kids, many(15, n, file("")), many(16, n, dir(nil)), many(31, n, symlink("l")))
		}
		return store(kids...)
	},
	"long names": func() *tree { return store(many(300, 255, file("x")), many(1, 255, dir(nil))) },
	"deep":       func() *tree { return store(nested(nar.MaxDepth), nested(1), nested(7)) },
	"many paths": func() *tree { return store(repeat(file("a"), 2000)...) },
	"mixed": func() *tree {
		return store(randomTree(rand.New(rand.NewPCG(1, 2)), 5), randomTree(rand.New(rand.NewPCG(3, 4)), 7))
	},
}

func repeat(n *tree, count int) []*tree {
	out := make([]*tree, count)
	for i := range out {
		out[i] = n
	}
	return out
}

// randomTree returns a tree of at most the given depth.
func randomTree(r *rand.Rand, depth int) *tree {
	switch k := r.IntN(10); {
	case k < 5 && depth > 0:
		kids := make(map[string]*tree)
		for range r.IntN(12) {
			kids[bytesOfName(r)] = randomTree(r, depth-1)
		}
		return dir(kids)
	case k < 6:
		return symlink(strings.Repeat("x", 1+r.IntN(4095)))
	case k < 8:
		return program(bytesOf(r.IntN(9000)))
	}
	return file(bytesOf(r.IntN(100)))
}

// bytesOfName returns a name.
func bytesOfName(r *rand.Rand) string {
	const alphabet = "!+-.0Aaz~ \""
	b := make([]byte, 1+r.IntN(1+r.IntN(255)))
	for i := range b {
		b[i] = alphabet[r.IntN(len(alphabet))]
	}
	if s := string(b); s != "." && s != ".." {
		return s
	}
	return "dots"
}

// TestImageEqualsTree compares images with what was packed, through the eyes of
// an independent reader.
func TestImageEqualsTree(t *testing.T) {
	trees := map[string]func() *tree{
		"50,000 entries": func() *tree { return store(many(50_000, 0, file("e"))) },
		"66,000 subdirectories": func() *tree {
			return store(many(66_000, 0, dir(nil)), file("next"))
		},
	}
	for name, f := range imageTrees {
		trees[name] = f
	}
	for name, f := range trees {
		t.Run(name, func(t *testing.T) {
			n := f()
			want := make(manifest)
			want.describe(n, "")
			m := n.image(t)
			if diff := cmp.Diff(want, oracle(t, m)); diff != "" {
				t.Errorf("image differs from tree (-want +got):\n%.4000s", diff)
			}
			if m.Inodes() != len(want) {
				t.Errorf("Inodes = %d, want %d", m.Inodes(), len(want))
			}
		})
	}
}

// TestImageFsck has fsck.erofs check and unpack images.
func TestImageFsck(t *testing.T) {
	fsck := tool(t, "fsck.erofs", "erofs-utils")
	for name, f := range imageTrees {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := f()
			path := writeImage(t, n.image(t))
			to := filepath.Join(t.TempDir(), "out")
			out, err := exec.Command(fsck, "--extract="+to, "--preserve-perms", "--no-preserve-owner", path).CombinedOutput()
			if err != nil || bytes.Contains(out, []byte("<E>")) {
				t.Fatalf("fsck.erofs: %v\n%s", err, out)
			}
			t.Cleanup(func() { makeWritable(to) })
			want := make(manifest)
			want.describe(n, "")
			if diff := cmp.Diff(want.withoutLinks(), walkDisk(t, to)); diff != "" {
				t.Errorf("unpacked files differ (-want +got):\n%.4000s", diff)
			}
		})
	}
}

// TestImageMount has this machine's kernel read images. Guests do the same with
// theirs, so that this test is the short way to a kernel's opinion.
func TestImageMount(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: only root may mount; the same trees went through fsck.erofs and go-erofs")
	}
	for name, f := range imageTrees {
		t.Run(name, func(t *testing.T) {
			n := f()
			path, at := writeImage(t, n.image(t)), t.TempDir()
			if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", path, at).CombinedOutput(); err != nil {
				t.Skipf("SKIPPED: this kernel mounts no EROFS from a loop device (%v, %s); "+
					"the same trees went through fsck.erofs and go-erofs", err, bytes.TrimSpace(out))
			}
			t.Cleanup(func() {
				if out, err := exec.Command("umount", at).CombinedOutput(); err != nil {
					t.Errorf("umount: %v\n%s", err, out)
				}
			})
			want := make(manifest)
			want.describe(n, "")
			if diff := cmp.Diff(want.withoutLinks(), walkDisk(t, at)); diff != "" {
				t.Errorf("mounted files differ (-want +got):\n%.4000s", diff)
			}
		})
	}
}

// makeWritable lets the owner remove a tree with the modes of a store.
func makeWritable(root string) {
	filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			return os.Chmod(path, 0o755)
		}
		return nil
	})
}

// zeros is an endless archive of zeros.
type zeros struct{}

func (zeros) ReadAt(p []byte, off int64) (int, error) { clear(p); return len(p), nil }

// TestImageHugeFile has files around the size from which inodes are extended.
func TestImageHugeFile(t *testing.T) {
	const four = 4 << 30
	index := nar.Index{{Kind: nar.Directory}}
	off := int64(128)
	for _, size := range []int64{four - 4097, four - 1, four, four + 1, 3 * four} {
		index = append(index, nar.Entry{Kind: nar.Regular, Depth: 1, Name: fmt.Sprintf("%012d", size), Offset: off, Size: size})
		off += size + 4096
	}
	m, err := NewImage([]ImagePath{{nixproto.StoreDir + "/x", zeros{}, off, index}})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(m.meta, 0); err != nil { // all the rest is zeros
		t.Fatal(err)
	}
	if err := f.Truncate(m.Size()); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool(t, "fsck.erofs", "erofs-utils"), path).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("<E>")) {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
	checkHugeFile(t, m, index)
}

// checkHugeFile looks at sizes and ends of the files of an image.
func checkHugeFile(t *testing.T, m *Image, index nar.Index) {
	t.Helper()
	fsys := openOracle(t, m)
	for _, e := range index[1:] {
		f, err := fsys.Open("x/" + e.Name)
		if err != nil {
			t.Fatal(err)
		}
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() != e.Size || info.ModTime().Unix() != 1 || info.Mode().Perm() != 0o444 {
			t.Errorf("%s: %d bytes, %v, %v", e.Name, info.Size(), info.ModTime(), info.Mode())
		}
		f.Close()
	}
}

// TestImageReadAt reads pieces of all lengths and offsets and compares them
// with one large read.
func TestImageReadAt(t *testing.T) {
	m := imageTrees["sizes of files"]().image(t)
	whole := make([]byte, m.Size())
	if n, err := m.ReadAt(whole, 0); n != len(whole) || err != nil && err != io.EOF {
		t.Fatalf("ReadAt of all = %d, %v", n, err)
	}
	r := rand.New(rand.NewPCG(5, 6))
	for range 20_000 {
		off := r.Int64N(m.Size() + 100)
		p := make([]byte, r.IntN(20_000))
		n, err := m.ReadAt(p, off)
		want := whole[min(off, m.Size()):min(off+int64(len(p)), m.Size())]
		if !bytes.Equal(p[:n], want) {
			t.Fatalf("ReadAt(%d bytes, %d) differs", len(p), off)
		}
		if short := n < len(p); short != (err == io.EOF) && off < m.Size() || err != nil && err != io.EOF {
			t.Fatalf("ReadAt(%d bytes, %d) = %d, %v of %d", len(p), off, n, err, m.Size())
		}
	}
	if _, err := m.ReadAt(make([]byte, 1), -1); err == nil || err == io.EOF {
		t.Errorf("ReadAt(-1): %v", err)
	}
}

// broken is an archive that cannot be read any more.
type broken struct{ err error }

func (b broken) ReadAt(p []byte, off int64) (int, error) { return 0, b.err }

// TestImageReadError checks that the end of an archive, or an error in it, is
// told from the end of the image.
func TestImageReadError(t *testing.T) {
	bad := errors.New("bad sector")
	for _, c := range []struct {
		nar  io.ReaderAt
		want error
	}{{broken{bad}, bad}, {strings.NewReader("short"), io.ErrUnexpectedEOF}, {broken{nil}, io.ErrUnexpectedEOF}} {
		index := nar.Index{{Kind: nar.Regular, Offset: 100, Size: 5000}}
		m, err := NewImage([]ImagePath{{nixproto.StoreDir + "/x", c.nar, 6000, index}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.ReadAt(make([]byte, m.Size()), 0); !errors.Is(err, c.want) {
			t.Errorf("error = %v, want %v", err, c.want)
		}
		if _, err := m.ReadAt(make([]byte, 4096), 0); err != nil {
			t.Errorf("metadata: %v", err)
		}
	}
}

// TestImageRefuses hands in what is no index of an archive.
func TestImageRefuses(t *testing.T) {
	root := nar.Entry{Kind: nar.Directory}
	in := func(name string) nar.Entry { return nar.Entry{Kind: nar.Regular, Depth: 1, Name: name} }
	for name, index := range map[string]nar.Index{
		"empty":                {},
		"no kind":              {{}},
		"root too deep":        {{Kind: nar.Directory, Depth: 1}},
		"two roots":            {root, root},
		"negative depth":       {root, {Kind: nar.Regular, Depth: -1, Name: "a"}},
		"depth skipped":        {root, {Kind: nar.Regular, Depth: 2, Name: "a"}},
		"below a file":         {{Kind: nar.Regular}, in("a")},
		"below a link":         {root, {Kind: nar.Symlink, Depth: 1, Name: "a", Target: "b"}, {Kind: nar.Regular, Depth: 2, Name: "c"}},
		"no name":              {root, in("")},
		"dot":                  {root, in(".")},
		"dots":                 {root, in("..")},
		"slash":                {root, in("a/b")},
		"NUL":                  {root, in("a\x00")},
		"long name":            {root, in(strings.Repeat("a", 256))},
		"equal names":          {root, in("a"), in("a")},
		"names out of order":   {root, in("b"), in("a")},
		"beyond the archive":   {{Kind: nar.Regular, Offset: 900, Size: 101}},
		"offset overflows":     {{Kind: nar.Regular, Offset: math.MaxInt64, Size: 10}},
		"size overflows":       {{Kind: nar.Regular, Offset: 10, Size: math.MaxInt64}},
		"negative offset":      {{Kind: nar.Regular, Offset: -1, Size: 10}},
		"negative size":        {{Kind: nar.Regular, Offset: 1, Size: -10}},
		"no target":            {{Kind: nar.Symlink}},
		"long target":          {{Kind: nar.Symlink, Target: strings.Repeat("a", 4096)}},
		"NUL in target":        {{Kind: nar.Symlink, Target: "a\x00"}},
		"kind that is unknown": {{Kind: 9}},
	} {
		if _, err := NewImage([]ImagePath{{nixproto.StoreDir + "/x", zeros{}, 1000, index}}); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	one := ImagePath{nixproto.StoreDir + "/x", zeros{}, 1000, nar.Index{root}}
	if _, err := NewImage([]ImagePath{one, one}); err == nil {
		t.Error("two paths of one name: taken")
	}
	big := ImagePath{nixproto.StoreDir + "/x", zeros{}, math.MaxInt64, nar.Index{{Kind: nar.Regular, Size: math.MaxInt64}}}
	if _, err := NewImage([]ImagePath{big}); err == nil {
		t.Error("file larger than the image can be: taken")
	}
	big.Size, big.Index = 17<<40, nar.Index{{Kind: nar.Regular, Size: 17 << 40}}
	if _, err := NewImage([]ImagePath{big}); err == nil {
		t.Error("file of 17 TiB: taken")
	}
}

// TestImageGolden tells when the bytes of images change: a saved guest may have
// them in its cache, and only a change of the format explains one.
func TestImageGolden(t *testing.T) {
	n := store(
		dir(map[string]*tree{
			"!x": file("first"), "bin": dir(map[string]*tree{"sh": program("#!"), "ash": symlink("sh")}),
			"empty": dir(nil), "zero": file(""), "big": file(strings.Repeat("0123456789", 1000)),
			"link": symlink(strings.Repeat("l", 4095)), "wide": many(200, 30, file("w")),
		}),
		file("a file"), symlink("/nix/store/a-link"))
	m := n.image(t)
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(m, 0, m.Size())); err != nil {
		t.Fatal(err)
	}
	const want = "68aa722462c4ffa7eea45d46336f002005211cfb3fe1f27711b8a81be5e228e2"
	if got := fmt.Sprintf("%x", h.Sum(nil)); got != want {
		t.Errorf("image has checksum %s, want %s", got, want)
	}
}
