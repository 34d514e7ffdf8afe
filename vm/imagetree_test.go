package vm

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	erofs "github.com/erofs/go-erofs"

	"nbd/nixproto"
	"nbd/nixproto/nar"
)

// A tree is a file, directory or link that a test packs into an archive. What
// it is follows from the first field that is set, from the top; a file else.
type tree struct {
	dir    bool
	target string
	exec   bool
	data   string
	kids   map[string]*tree
}

// Short forms of trees.
func file(data string) *tree          { return &tree{data: data} }
func program(data string) *tree       { return &tree{data: data, exec: true} }
func symlink(target string) *tree     { return &tree{target: target} }
func dir(kids map[string]*tree) *tree { return &tree{dir: true, kids: kids} }

// pack writes the tree to w.
func (n *tree) pack(w *nar.Writer, name string) error {
	switch {
	case n.dir:
		if err := w.Directory(name); err != nil {
			return err
		}
		names := make([]string, 0, len(n.kids))
		for k := range n.kids {
			names = append(names, k)
		}
		slices.Sort(names)
		for _, k := range names {
			if err := n.kids[k].pack(w, k); err != nil {
				return err
			}
		}
		return w.EndDirectory()
	case n.target != "":
		return w.Symlink(name, n.target)
	}
	if err := w.File(name, n.exec, int64(len(n.data))); err != nil {
		return err
	}
	_, err := io.WriteString(w, n.data)
	return err
}

// archive returns the tree as a NAR.
func (n *tree) archive(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := nar.NewWriter(&b)
	if err := n.pack(w, ""); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// image returns the image of a tree whose entries are store paths.
func (n *tree) image(t testing.TB) *Image {
	t.Helper()
	m, err := NewImage(n.paths(t))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// paths returns the entries of n as store paths, in no order.
func (n *tree) paths(t testing.TB) []ImagePath {
	t.Helper()
	var paths []ImagePath
	for name, kid := range n.kids {
		b := kid.archive(t)
		index, size, err := nar.ReadIndex(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		path := nixproto.StorePath(nixproto.StoreDir + "/" + name)
		paths = append(paths, ImagePath{path, bytes.NewReader(b), size, index})
	}
	return paths
}

// A manifest says of each path what is there: type, permissions, number of
// links of a directory, and contents or target.
type manifest map[string]string

// describe adds n and what is below it.
func (m manifest) describe(n *tree, path string) {
	switch {
	case n.dir:
		links := 2
		for name, kid := range n.kids {
			if kid.dir {
				links++
			}
			m.describe(kid, strings.TrimPrefix(path+"/"+name, "/"))
		}
		m[path] = describeDir(0o555, links)
	case n.target != "":
		m[path] = "link to " + n.target
	case n.exec:
		m[path] = describeFile(0o555, []byte(n.data))
	default:
		m[path] = describeFile(0o444, []byte(n.data))
	}
}

func describeDir(mode fs.FileMode, links int) string {
	return fmt.Sprintf("directory %v, %d links", mode, links)
}

func describeFile(mode fs.FileMode, data []byte) string {
	return fmt.Sprintf("file %v, %d bytes, %x", mode, len(data), sha256.Sum256(data))
}

// oracle reads an image with another implementation of EROFS. That checks
// owners and times, too.
func oracle(t testing.TB, image io.ReaderAt) manifest {
	t.Helper()
	fsys := openOracle(t, image)
	m := make(manifest)
	err := fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := fs.Lstat(fsys, path)
		if err != nil {
			return err
		}
		st := info.Sys().(*erofs.Stat)
		if st.UID != 0 || st.GID != 0 || st.Mtime != 1 || st.MtimeNs != 0 {
			t.Errorf("%s: owner %d:%d, time %d.%d", path, st.UID, st.GID, st.Mtime, st.MtimeNs)
		}
		key := strings.TrimPrefix(path, ".")
		if path != "." {
			key = path
		}
		m[key], err = describeFS(fsys, path, info)
		return err
	})
	if err != nil {
		t.Fatalf("go-erofs: %v", err)
	}
	return m
}

// openOracle opens an image with another implementation of EROFS.
func openOracle(t testing.TB, image io.ReaderAt) fs.FS {
	t.Helper()
	fsys, err := erofs.Open(image)
	if err != nil {
		t.Fatalf("go-erofs: %v", err)
	}
	return fsys
}

// describeFS describes one path of a file system.
func describeFS(fsys fs.FS, path string, info fs.FileInfo) (string, error) {
	switch info.Mode().Type() {
	case fs.ModeDir:
		links := info.(interface{ Nlink() uint64 }).Nlink()
		return describeDir(info.Mode().Perm(), int(links)), nil
	case fs.ModeSymlink:
		if info.Mode().Perm() != 0o777 {
			return "", fmt.Errorf("%s: link has mode %v", path, info.Mode())
		}
		target, err := fs.ReadLink(fsys, path)
		return "link to " + target, err
	case 0:
		b, err := fs.ReadFile(fsys, path)
		return describeFile(info.Mode().Perm(), b), err
	}
	return "", fmt.Errorf("%s: unexpected %v", path, info.Mode())
}

// walkDisk describes what is below a directory of the host. Its kernel counts
// no links of directories on all file systems, so that numbers of links are
// left out.
func walkDisk(t testing.TB, root string) manifest {
	t.Helper()
	m := make(manifest)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		key := strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		switch info.Mode().Type() {
		case fs.ModeDir:
			m[key] = describeDir(info.Mode().Perm(), 0)
		case fs.ModeSymlink:
			target, err := os.Readlink(path)
			m[key] = "link to " + target
			return err
		default:
			b, err := os.ReadFile(path)
			m[key] = describeFile(info.Mode().Perm(), b)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// withoutLinks returns m with 0 for each number of links of a directory.
func (m manifest) withoutLinks() manifest {
	out := make(manifest, len(m))
	for k, v := range m {
		if mode, _, ok := strings.Cut(v, ", "); ok && strings.HasPrefix(v, "directory ") {
			v = mode + ", 0 links"
		}
		out[k] = v
	}
	return out
}

// writeImage writes an image to a sparse file and returns its path.
func writeImage(t testing.TB, m *Image) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf, zero := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < m.Size(); off += int64(len(buf)) {
		n, err := m.ReadAt(buf, off)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if bytes.Equal(buf[:n], zero[:n]) {
			continue
		}
		if _, err := f.WriteAt(buf[:n], off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(m.Size()); err != nil {
		t.Fatal(err)
	}
	return path
}
