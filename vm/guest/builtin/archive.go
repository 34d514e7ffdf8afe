package builtin

import (
	"archive/tar"
	"archive/zip"
	"bufio"
	"compress/bzip2"
	"errors"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// unpackArchive unpacks a tar or zip archive into the directory dir. Its texts
// are those of libarchive, which Nix uses.
func unpackArchive(file, dir string) error {
	f, err := os.Open(file)
	if err != nil {
		return errorf("failed to open archive: %s", "Failed to open '"+file+"'")
	}
	defer f.Close() // only read from
	content, err := decompress(f)
	if errors.Is(err, syscall.EISDIR) {
		return errorf("failed to open archive: %s", "Error reading '"+file+"'")
	}
	if err != nil {
		return errorf("failed to open archive: %s", err)
	}
	x, err := newExtractor(dir)
	if err != nil {
		return err
	}
	defer x.close()
	head, err := content.Peek(4)
	var damaged *filterError
	switch {
	case errors.As(err, &damaged):
		return errorf("failed to open archive: %s", err)
	case err != nil && err != io.EOF:
		return errorf("failed to open archive: %s", "Error reading '"+file+"'")
	case len(head) == 0:
		return nil
	case begins("PK\x03\x04")(head) || begins("PK\x05\x06")(head):
		return extractZip(x, f)
	}
	return extractTar(x, content)
}

func extractTar(x *extractor, r *bufio.Reader) error {
	t := tar.NewReader(r)
	for first := true; ; first = false {
		h, err := t.Next()
		var damaged *filterError
		switch {
		case err == io.EOF:
			return nil
		case errors.Is(err, tar.ErrInsecurePath): // the extractor looks for itself
		case first && errors.As(err, &damaged):
			return errorf("failed to open archive: %s", err)
		case first && err != nil:
			return errorf("failed to open archive: %s", "Unrecognized archive format")
		case err != nil:
			return extractError(err)
		}
		if err := extractMember(x, h, t); err != nil {
			return extractError(err)
		}
	}
}

// Kinds of members that GNU tar alone makes: the label of a volume, and a
// directory whose contents are a list of what was in it.
const typeVolume, typeDumpDir = 'V', 'D'

// extractMember extracts one member of a tar archive.
func extractMember(x *extractor, h *tar.Header, contents io.Reader) error {
	switch h.Typeflag {
	case tar.TypeXGlobalHeader, typeVolume:
		return nil
	case tar.TypeDir, typeDumpDir:
		return x.directory(h.Name)
	case tar.TypeSymlink:
		return x.symlink(h.Name, h.Linkname)
	case tar.TypeLink:
		return x.link(h.Name, h.Linkname)
	case tar.TypeFifo:
		return x.fifo(h.Name)
	case tar.TypeChar, tar.TypeBlock:
		return x.cannot(h.Name) // who is not root cannot
	}
	return x.file(h.Name, h.Mode&0o100 != 0, contents)
}

// zipBzip2 is a method of compression in zip archives (APPNOTE.TXT 4.4.5).
const zipBzip2 = 12

// extractZip extracts a zip archive, which is not compressed as a whole.
func extractZip(x *extractor, f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return extractError(err)
	}
	z, err := zip.NewReader(f, info.Size())
	if err != nil && !errors.Is(err, zip.ErrInsecurePath) {
		return errorf("failed to open archive: %s", err)
	}
	z.RegisterDecompressor(zipBzip2, func(r io.Reader) io.ReadCloser { return io.NopCloser(bzip2.NewReader(r)) })
	for _, m := range z.File {
		if err := extractZipped(x, m); err != nil {
			return extractError(err)
		}
	}
	return nil
}

func extractZipped(x *extractor, m *zip.File) error {
	if m.Mode().IsDir() {
		return x.directory(m.Name)
	}
	r, err := m.Open()
	if err != nil {
		return err
	}
	defer r.Close() // only read from
	switch m.Mode().Type() {
	case 0:
		return x.file(m.Name, m.Mode()&0o100 != 0, r)
	case fs.ModeSymlink:
		target, err := io.ReadAll(io.LimitReader(r, maxTarget+1))
		if err != nil {
			return err
		}
		return x.symlink(m.Name, string(target))
	}
	return x.cannot(m.Name)
}

// extractError says that an archive cannot be unpacked.
func extractError(err error) error {
	text := err.Error()
	var damaged *filterError
	if errors.Is(err, io.ErrUnexpectedEOF) && !errors.As(err, &damaged) {
		text = "Truncated tar archive detected while reading data"
	}
	return errorf("failed to extract archive (%s)", text)
}
