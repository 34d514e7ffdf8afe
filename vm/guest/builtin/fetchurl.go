package builtin

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"

	"github.com/ulikunitz/xz"

	"nbd/nixproto/nar"
)

// CACertificates is the file with the certificates that fetchurl trusts, in PEM.
const CACertificates = "/etc/ssl/certs/ca-certificates.crt"

// fetchURL is builtin:fetchurl.
func fetchURL(ctx context.Context, o *Order, log *logger) error {
	return newFetcher(log, CACertificates).run(ctx, o)
}

// run does what an order says.
func (f *fetcher) run(ctx context.Context, o *Order) error {
	out, err := o.out()
	if err != nil {
		return err
	}
	if !o.Fixed {
		return fmt.Errorf("'builtin:fetchurl' must be a fixed-output or impure derivation")
	}
	link, err := o.attr("url")
	if err != nil {
		return err
	}
	if unpack, _ := o.lookup("unpack"); unpack == "1" {
		err = f.unpack(ctx, link, out)
	} else {
		err = f.save(ctx, link, out)
	}
	if err != nil {
		return err
	}
	if executable, _ := o.lookup("executable"); executable == "1" {
		if err := os.Chmod(out, 0o755); err != nil {
			return errorf("setting permissions on '%s': %s", out, reason(err))
		}
	}
	return nil
}

// save downloads to a file.
func (f *fetcher) save(ctx context.Context, link, out string) error {
	w, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o666)
	if err == nil {
		err = f.download(ctx, link, w)
		if cerr := w.Close(); err == nil {
			err = cerr
		}
	}
	if err != nil {
		// As Nix says that an error came while something was done.
		return fmt.Errorf("\n… writing file %s\n\n%serror:%s %w", magenta+quoted(out)+plain, red, plain, err)
	}
	return nil
}

// unpack downloads a Nix archive, compressed if the URL says so, and restores it.
// It is kept until all of it has come: nothing is made of half an archive.
func (f *fetcher) unpack(ctx context.Context, link, out string) (err error) {
	file, err := namelessFile()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := f.download(ctx, link, file); err != nil {
		return err
	}
	if strings.HasSuffix(link, ".xz") {
		plain, err := unxz(file)
		if err != nil {
			return err
		}
		defer plain.Close() // only read from
		return restore(plain, out)
	}
	return restore(file, out)
}

// namelessFile returns a new file in the current directory, the build's, that is
// gone when it is closed.
func namelessFile() (*os.File, error) {
	file, err := os.CreateTemp(".", "nar-")
	if err != nil {
		return nil, errorf("creating temporary file: %s", reason(err))
	}
	if err := os.Remove(file.Name()); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// unxz returns what is in a file in the format of xz, as a file without a name.
func unxz(packed *os.File) (*os.File, error) {
	file, err := namelessFile()
	if err != nil {
		return nil, err
	}
	r, err := rewound(packed)
	var z io.Reader
	if err == nil {
		z, err = xz.NewReader(r)
	}
	if err == nil {
		_, err = io.Copy(file, filtered{"xz", z})
	}
	if err != nil {
		return nil, errors.Join(errorf("failed to read compressed data (%s)", err), file.Close())
	}
	return file, nil
}

// rewound returns a reader of a file from its beginning.
func rewound(f *os.File) (*bufio.Reader, error) {
	_, err := f.Seek(0, io.SeekStart)
	return bufio.NewReaderSize(f, 256<<10), err
}

// restore makes what an archive holds at the path out.
func restore(archive *os.File, out string) error {
	r, err := rewound(archive)
	if err != nil {
		return err
	}
	// Of what follows the archive Nix takes no notice.
	var p nar.Parser
	for !p.Done() {
		b, err := r.Peek(1)
		if err == nil {
			b, err = r.Peek(r.Buffered())
		}
		if err == io.EOF {
			err = p.Close()
		}
		n := 0
		if err == nil {
			n, err = p.Feed(b)
		}
		if err != nil {
			return errorf("bad archive: %s", err)
		}
		if _, err := r.Discard(n); err != nil {
			return err
		}
	}
	return restoreIndex(archive, p.Index(), out)
}

// restoreIndex makes the entries of an archive. Names are no paths, and no two
// are alike in one directory, so that nothing is made through a symlink.
func restoreIndex(archive io.ReaderAt, index nar.Index, out string) error {
	var names []string
	for _, e := range index {
		names = append(names[:e.Depth], e.Name)
		path := strings.TrimSuffix(out+strings.Join(names, "/"), "/")
		if err := restoreEntry(archive, e, path); err != nil {
			return errorf("restoring '%s': %s", path, reason(err))
		}
	}
	return nil
}

func restoreEntry(archive io.ReaderAt, e nar.Entry, path string) error {
	switch e.Kind {
	case nar.Directory:
		return os.Mkdir(path, 0o777)
	case nar.Symlink:
		return os.Symlink(e.Target, path)
	}
	mode := os.FileMode(0o666)
	if e.Executable {
		mode = 0o777
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, nar.Contents(archive, e))
	return errors.Join(err, f.Close())
}

// parseURL reads a URL.
func parseURL(link string) (*url.URL, error) {
	u, err := url.Parse(link)
	if err != nil {
		var bad *url.Error
		if errors.As(err, &bad) {
			err = bad.Err
		}
		return nil, errorf("'%s' is not a valid URL: %s", link, err)
	}
	if u.Scheme == "" {
		return nil, errorf("URL '%s' doesn't have a scheme", link)
	}
	return u, nil
}
