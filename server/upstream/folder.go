package upstream

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// A folder is a cache that lies in the file system (file://), the operator's
// alone.
type folder string

// get implements getter. A reference that leads out of the folder is refused;
// where links lead is the operator's to know.
func (f folder) get(_ context.Context, ref string) (*body, error) {
	name := filepath.FromSlash(ref)
	if !filepath.IsLocal(name) {
		return nil, fmt.Errorf("%w: it leads out of the folder", ErrMalformed)
	}
	// Without waiting, should it be a named pipe.
	file, err := os.OpenFile(filepath.Join(string(f), name), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", ref, ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	st, err := file.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file", ref)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &body{r: file, close: file.Close, size: st.Size()}, nil
}
