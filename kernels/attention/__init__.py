"""What attention needs beside the codec: page tables, masks, softmax."""
