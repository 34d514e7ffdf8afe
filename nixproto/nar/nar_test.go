package nar

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A node is an entry with its contents, from which a tree can be written.
type node struct {
	Kind       Kind
	Executable bool
	Depth      int
	Name       string
	Contents   string // or the target
}

// narTests says what is in testdata/nar; reader and writer are tested by it.
var narTests = []struct {
	name string
	tree []node
}{
	{"empty-file", []node{{Kind: Regular}}},
	{"file", []node{{Kind: Regular, Contents: "hello\n"}}},
	{"executable", []node{{Kind: Regular, Executable: true, Contents: "#!/bin/sh\necho hi\n"}}},
	{"symlink", []node{{Kind: Symlink, Contents: "../some/where"}}},
	{"empty-directory", []node{{Kind: Directory}}},
	{"names", []node{
		{Kind: Directory},
		{Regular, false, 1, "-dash", "333"},
		{Regular, false, 1, ".hidden", "22"},
		{Regular, false, 1, strings.Repeat("0", 255), "999999999"},
		{Regular, false, 1, "A", "7777777"},
		{Regular, false, 1, "a", "88888888"},
		{Symlink, false, 1, "link", "target with space\nand \xe9"},
		{Symlink, false, 1, "long-link", strings.Repeat("0", 4095)},
		{Regular, false, 1, "new\nline", "666666"},
		{Regular, false, 1, "with space", "1"},
		{Regular, false, 1, "ümläut-日本", "4444"},
		{Regular, false, 1, "\xffraw", "55555"},
	}},
	{"tree", []node{
		{Kind: Directory},
		{Directory, false, 1, "bin", ""},
		{Symlink, false, 2, "alias", "run"},
		{Regular, true, 2, "run", "#!/bin/sh\n"},
		{Regular, true, 2, "zero", ""},
		{Directory, false, 1, "lib", ""},
		{Directory, false, 2, "empty", ""},
		{Regular, false, 2, "zeros", strings.Repeat("\x00", 5000)},
		{Directory, false, 1, "share", ""},
		{Directory, false, 2, "doc", ""},
		{Regular, false, 3, "a", "text"},
		{Regular, false, 2, "doc.txt", "text"},
		{Regular, false, 1, "z", "last"},
	}},
	{"deep", deepTree()},
}

func deepTree() []node {
	tree := []node{{Kind: Directory}}
	for depth := 1; depth < MaxDepth; depth++ {
		tree = append(tree, node{Directory, false, depth, "d", ""})
	}
	return append(tree, node{Regular, false, MaxDepth, "f", "x"})
}

// golden returns an archive of testdata/nar.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "testdata", "nar", name+".nar"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// nodes returns the tree that x is the index of.
func nodes(x Index, archive []byte) []node {
	var tree []node
	for _, e := range x {
		n := node{e.Kind, e.Executable, e.Depth, e.Name, e.Target}
		if e.Kind == Regular {
			n.Contents = string(archive[e.Offset : e.Offset+e.Size])
		}
		tree = append(tree, n)
	}
	return tree
}

// write writes tree to w.
func write(w *Writer, tree []node) error {
	open := 0
	for _, n := range tree {
		for ; open > n.Depth; open-- {
			if err := w.EndDirectory(); err != nil {
				return err
			}
		}
		var err error
		switch n.Kind {
		case Directory:
			err = w.Directory(n.Name)
			open++
		case Regular:
			if err = w.File(n.Name, n.Executable, int64(len(n.Contents))); err == nil {
				_, err = w.Write([]byte(n.Contents))
			}
		case Symlink:
			err = w.Symlink(n.Name, n.Contents)
		}
		if err != nil {
			return err
		}
	}
	for ; open > 0; open-- {
		if err := w.EndDirectory(); err != nil {
			return err
		}
	}
	return w.Close()
}

func TestParse(t *testing.T) {
	for _, tt := range narTests {
		t.Run(tt.name, func(t *testing.T) {
			archive := golden(t, tt.name)
			x, size, err := ReadIndex(bytes.NewReader(archive))
			if err != nil {
				t.Fatal(err)
			}
			if size != int64(len(archive)) || x.NARSize() != size {
				t.Errorf("size %d, NARSize %d, want %d", size, x.NARSize(), len(archive))
			}
			if d := cmp.Diff(tt.tree, nodes(x, archive)); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestParsePieces(t *testing.T) {
	for _, tt := range narTests {
		archive := golden(t, tt.name)
		whole, _, err := ReadIndex(bytes.NewReader(archive))
		if err != nil {
			t.Fatal(err)
		}
		more := append(bytes.Clone(archive), "and what follows on the stream"...)
		for _, size := range []int{1, 2, 3, 7, 8, 15, 16, 17, 100, 1000, len(more)} {
			var p Parser
			var taken int
			for !p.Done() {
				n, err := p.Feed(more[taken:min(taken+size, len(more))])
				if err != nil {
					t.Fatalf("%s in pieces of %d: %v", tt.name, size, err)
				}
				taken += n
			}
			if taken != len(archive) || p.Size() != int64(taken) {
				t.Errorf("%s in pieces of %d: took %d bytes of %d", tt.name, size, taken, len(archive))
			}
			if n, err := p.Feed([]byte("x")); n != 0 || err != nil {
				t.Errorf("%s: Feed after the end = %d, %v", tt.name, n, err)
			}
			if d := cmp.Diff(whole, p.Index()); d != "" {
				t.Errorf("%s in pieces of %d: %s", tt.name, size, d)
			}
		}
	}
}

func TestWrite(t *testing.T) {
	for _, tt := range narTests {
		t.Run(tt.name, func(t *testing.T) {
			var buf bytes.Buffer
			w := NewWriter(&buf)
			if err := write(w, tt.tree); err != nil {
				t.Fatal(err)
			}
			if want := golden(t, tt.name); !bytes.Equal(buf.Bytes(), want) {
				t.Errorf("got %q\nwant %q", buf.Bytes(), want)
			}
			if w.Size() != int64(buf.Len()) {
				t.Errorf("Size = %d, want %d", w.Size(), buf.Len())
			}
		})
	}
}

func TestLookup(t *testing.T) {
	archive := golden(t, "tree")
	x, _, err := ReadIndex(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	for i := range x {
		if got, ok := x.Lookup(x.Path(i)); !ok || got != i {
			t.Errorf("Lookup(%q) = %d, %v, want %d", x.Path(i), got, ok, i)
		}
	}
	for _, path := range []string{"/", "bin/", "bin//run", "run", "a", "bin/run/x", "share/../z", "zz", "lib/empty/zeros"} {
		if i, ok := x.Lookup(path); ok {
			t.Errorf("Lookup(%q) = %d", path, i)
		}
	}
	if _, ok := Index(nil).Lookup(""); ok {
		t.Error("an empty index has a root")
	}
	i, _ := x.Lookup("bin/run")
	got := make([]byte, x[i].Size)
	if _, err := Contents(bytes.NewReader(archive), x[i]).ReadAt(got, 0); err != nil || string(got) != "#!/bin/sh\n" {
		t.Errorf("Contents = %q, %v", got, err)
	}
}
