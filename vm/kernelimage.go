package vm

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// imageHead is how many bytes of a kernel image identifyImage wants to see: in a
// bzImage the version text lies in the setup code, of at most 64 sectors.
const imageHead = 64 << 10

// errNotImage is the error for what is no kernel image.
var errNotImage = errors.New("not a kernel image for x86-64 or aarch64")

// identifyImage tells of a kernel image, by its first bytes, for which
// architecture it is and its release, "" where the format does not tell that.
func identifyImage(head []byte) (*arch, string, error) {
	if isArm64Image(head) {
		return archAArch64, "", nil
	}
	release, err := bzImageRelease(head)
	return archX8664, release, err
}

// bzImageRelease returns the kernel's release as told in the first bytes of a
// bzImage. The format is that of the x86 boot protocol
// (Documentation/arch/x86/boot.rst): boot flag at 0x1fe, "HdrS" at 0x202, and
// at 0x20e the offset, less 0x200, of a text that starts with the release.
func bzImageRelease(head []byte) (string, error) {
	if len(head) < 0x210 || head[0x1fe] != 0x55 || head[0x1ff] != 0xaa || string(head[0x202:0x206]) != "HdrS" {
		return "", errNotImage
	}
	at := int(binary.LittleEndian.Uint16(head[0x20e:])) + 0x200
	if at == 0x200 || at >= len(head) {
		return "", errors.New("kernel image does not tell its version")
	}
	text := head[at:min(at+128, len(head))]
	end := bytes.IndexAny(text, " \x00")
	if end < 0 {
		return "", errors.New("kernel image does not tell its version")
	}
	name := string(text[:end])
	if err := checkKernelName(name); err != nil {
		return "", err
	}
	return name, nil
}

// isArm64Image reports whether head starts an Image for aarch64
// (Documentation/arch/arm64/booting.rst in the kernel's sources): "ARM\x64" at
// 56. It does not tell its release.
func isArm64Image(head []byte) bool {
	return len(head) >= 64 && string(head[56:60]) == "ARM\x64"
}

// plainImage returns a reader of a kernel image as QEMU of any version loads it:
// unpacked, where it is wrapped into a compressed file, or into an EFI program
// that unpacks itself (drivers/firmware/efi/libstub/zboot-header.S: "MZ", "zimg"
// at 4, offset and size of the contents at 8 and 12, name of the compression at
// 24).
func plainImage(r io.Reader) (*bufio.Reader, error) {
	b := bufio.NewReaderSize(r, imageHead)
	head, err := b.Peek(64)
	if err != nil && err != io.EOF {
		return nil, err
	}
	ext := compressionOf(head)
	var packed io.Reader = b
	if len(head) == 64 && string(head[:2]) == "MZ" && string(head[4:8]) == "zimg" {
		offset, size := int64(binary.LittleEndian.Uint32(head[8:])), int64(binary.LittleEndian.Uint32(head[12:]))
		name, _, _ := strings.Cut(string(head[24:56]), "\x00")
		switch name {
		case "gzip":
			ext = ".gz"
		case "zstd", "zstd22":
			ext = ".zst"
		case "xz", "xzkern":
			ext = ".xz"
		default:
			return nil, fmt.Errorf("kernel image is compressed by %q", name)
		}
		if _, err := io.CopyN(io.Discard, b, offset); err != nil {
			return nil, fmt.Errorf("read kernel image: %w", err)
		}
		packed = io.LimitReader(b, size)
	}
	if ext == "" {
		return b, nil
	}
	u, err := decompressor(packed, ext)
	if err != nil {
		return nil, fmt.Errorf("unpack kernel image: %w", err)
	}
	return bufio.NewReaderSize(u, imageHead), nil
}
