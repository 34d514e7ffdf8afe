package builtin

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// unpackChannel is builtin:unpack-channel.
func unpackChannel(o *Order, _ *logger) error {
	out, err := o.out()
	if err != nil {
		return err
	}
	name, err := o.attr("channelName")
	if err != nil {
		return err
	}
	src, err := o.attr("src")
	if err != nil {
		return err
	}
	if strings.Contains(name, "/") {
		return errorf("channelName is not allowed to contain filesystem separators, got %s", name)
	}
	if err := makeDir(out); err != nil {
		return err
	}
	if err := unpackArchive(src, out); err != nil {
		return err
	}
	entries, err := os.ReadDir(out)
	if err != nil {
		return errorf("cannot read directory %s: %s", quoted(out), reason(err))
	}
	if len(entries) == 0 {
		return errorf("channel tarball '%s' is empty", src)
	}
	if len(entries) > 1 {
		return errorf("channel tarball '%s' contains more than one file", src)
	}
	from, to := out+"/"+entries[0].Name(), out+"/"+name
	// Not os.Rename, which looks before it leaps.
	if err := unix.Rename(from, to); err != nil {
		return errorf("failed to rename %s to %s: %s", from, to, reason(err))
	}
	return nil
}
